"""Exported pages in Debian's chromium: opened from disk, without a network, they tell the command line's stories."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_page import bars_of, squeeze, story_of, tell, wait_for_text, write_page
from command_line import tinystories as run_command

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html.check import describe_request, run_page
from tinystories.generate.batching import Request

pytestmark = pytest.mark.browser

HOSTILE = "</title></script><script>window.isHacked = true</script><img src=x onerror=alert(1)>"


def test_fifty_seeds_have_the_ids_of_the_command_line(
    open_file: Callable[..., Any], bundled_page: Path, storyteller: tinystories.Storyteller, tmp_path: Path
) -> None:
    """The program of the page, in the page: opened from disk, offline. One in five without WebAssembly."""
    prompts = ("", "Once upon a time", 'Lily said: "Tom\'s café 🙂"', "The little fox\n\n")
    requests = [
        Request(prompt=prompts[seed % 4], settings=storyteller.settings, seed=seed, max_tokens=50) for seed in range(50)
    ]
    with_wasm, plain = requests[:40], requests[40:]
    results = []
    for group, is_plain in ((with_wasm, False), (plain, True)):
        questions = {"requests": [describe_request(request) for request in group], "plain": is_plain}
        page = open_file(bundled_page, f"#check={json.dumps(questions)}")
        results += json.loads(page.locator("#check").text_content())
    stories = {i: item for i, item in storyteller.events(requests) if not isinstance(item, str)}
    for i, result in enumerate(results):
        assert result["ids"] == list(stories[i].ids), requests[i]
    out = tmp_path / "stories.jsonl"
    command = ("generate", "--seed", "0", "--max-tokens", "50", "--engine", "cpu", "--no-stream", "--out", str(out))
    assert run_command(*command).returncode == 0
    assert json.loads(out.read_text(encoding="utf-8"))["ids"] == results[0]["ids"]


def test_the_page_tells_the_story_of_a_seed(
    open_file: Callable[..., Any], bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    """Typed in, or in the address; and the command that it shows tells it too."""
    page = open_file(bundled_page)
    for seed, beginning in ((12, ""), (2**40 + 7, "The little fox could not sleep.")):
        story = storyteller.generate(beginning, seed=seed, max_tokens=900)
        assert tell(page, seed, beginning=beginning) == squeeze(story.text)
    command = page.locator(".command").inner_text()
    assert command == (
        f"tinystories generate --seed {2**40 + 7} --max-tokens 900 --prompt 'The little fox could not sleep.'"
    )
    again = open_file(bundled_page, page.evaluate("location.hash"))
    again.get_by_role("button", name="Copy").wait_for()
    assert story_of(again) == squeeze(story.text)
    assert again.get_by_label("Seed").input_value() == str(2**40 + 7)


def test_a_story_grows_word_by_word_and_stops_at_once(open_file: Callable[..., Any], bundled_page: Path) -> None:
    page = open_file(bundled_page)
    page.evaluate("window.allow(0)")
    page.get_by_label("Seed").fill("12")
    page.get_by_label("How does the story begin?").fill("")
    page.get_by_role("button", name="Tell").click()
    page.locator(".cursor").wait_for()
    for text in ("Once upon", "Once upon a time", "Once upon a time, there"):
        page.evaluate("window.allow(2)")  # tokens
        page.locator(".words", has_text=text).wait_for()
        assert story_of(page) == text
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("window.sent.includes('stop')")
    assert story_of(page) == text
    page.evaluate("window.allow(Infinity)")  # what was on its way comes too late
    page.get_by_role("button", name="Copy").wait_for()
    assert story_of(page) == text
    assert page.locator(".cursor").count() == 0
    assert page.locator("[aria-live]").first.text_content() is not None


def test_again_length_and_boldness(
    open_file: Callable[..., Any], bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    page = open_file(bundled_page)
    whole = squeeze(storyteller.generate("Tom had a boat.", seed=5, max_tokens=900).text)
    short = tell(page, 5, beginning="Tom had a boat.", length="short")
    assert whole.startswith(short)
    assert short[-1] in '.!?"'
    assert 60 <= len(short.split()) < len(whole.split())
    page.get_by_role("button", name="Again").click()
    page.get_by_role("button", name="Copy").wait_for()
    assert story_of(page) != short
    assert page.get_by_label("Seed").input_value() == ""
    page.get_by_role("slider", name="Boldness").press("Home")
    assert page.locator("output[for=boldness]").inner_text() == "very safe"
    story = storyteller.generate("Tom had a boat.", seed=5, max_tokens=900, temperature=0.32)
    assert tell(page, 5, beginning="Tom had a boat.") == squeeze(story.text)
    assert page.locator(".command").inner_text().endswith("--prompt 'Tom had a boat.' --temperature 0.32")


def test_a_story_can_be_kept(open_file: Callable[..., Any], bundled_page: Path, tmp_path: Path) -> None:
    page = open_file(bundled_page, permissions=["clipboard-read", "clipboard-write"])
    tell(page, 3, beginning="Ben", length="short")
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied.").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.startswith("Ben")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "story.txt")
    assert (tmp_path / "story.txt").read_text(encoding="utf-8") == f"{text}\n"
    page.get_by_role("button", name="Link").click()
    page.get_by_text("The link is copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.url


def test_next_word_shows_the_probabilities_of_the_python_api(
    open_file: Callable[..., Any], bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    page = open_file(bundled_page)
    tell(page, 12, length="short")
    page.locator(".word", has_text="named").first.click()
    text = "Once upon a time, there was a little girl"
    wait_for_text(page, text)
    candidates = storyteller.next_token(text).candidates(12)
    assert bars_of(page) == [candidate.id for candidate in candidates]
    assert "bar cut" in {bar.get_attribute("class") for bar in page.locator("button.bar").all()}
    assert page.evaluate("document.activeElement.className").startswith("bar")  # keys go on from here
    page.keyboard.press("1")
    wait_for_text(page, text + candidates[0].text)
    page.keyboard.press("2")
    second = storyteller.next_token(text + candidates[0].text).candidates(12)[1].text
    wait_for_text(page, text + candidates[0].text + second)
    page.keyboard.press("r")
    wait_for_text(page, text + candidates[0].text)
    page.keyboard.press(" ")  # draws one
    page.locator(".strip").wait_for()
    assert page.locator(".strip i").evaluate("bar => bar.style.width").endswith("%")
    assert page.locator(".strip i").bounding_box()["height"] > 10
    page.keyboard.press("r")
    wait_for_text(page, text + candidates[0].text)
    page.get_by_role("slider", name="Min-p").fill("0.5")
    page.get_by_text("1 of 4096 tokens may be drawn").wait_for()
    page.locator("button.bar").nth(2).click()  # also what the settings cut can be chosen
    third = storyteller.next_token(text + candidates[0].text).candidates(12)[2].text
    wait_for_text(page, text + candidates[0].text + third)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(open_file: Callable[..., Any], bundled_page: Path, scheme: str) -> None:
    """Nothing is wider than the screen, what is tapped is large enough, and the theme can be switched."""
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    page = open_file(bundled_page, **options)
    tell(page, 12, length="short")
    page.locator(".about summary").tap()
    page.locator(".next summary").tap()
    page.locator("button.bar").first.wait_for()
    assert page.locator(".tail").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 32
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert (page.evaluate(brightness) > 128) == (scheme == "light")
    page.get_by_role("button", name="Light or dark").tap()
    assert (page.evaluate(brightness) > 128) == (scheme == "dark")


def test_the_keyboard_alone(open_file: Callable[..., Any], bundled_page: Path) -> None:
    page = open_file(bundled_page)
    page.evaluate("window.allow(0)")
    page.get_by_label("How does the story begin?").focus()
    page.keyboard.press("Control+Enter")
    page.locator(".cursor").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Copy").wait_for()
    page.evaluate("window.allow(Infinity)")
    page.locator(".word").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "a"
    page.keyboard.press("Enter")
    wait_for_text(page, "Once upon")
    assert page.locator("[tabindex='0'].word").count() == 1


def test_a_hostile_title_stays_text(open_file: Callable[..., Any], tmp_path: Path) -> None:
    model = dataclasses.replace(ModelBundle.read(BUNDLED_MODEL), title=HOSTILE, license=HOSTILE)
    page = open_file(write_page(model, tmp_path / "story.html"))
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.title() == HOSTILE
    assert page.evaluate("window.isHacked") is None
    assert tell(page, 12, length="short").startswith("Once upon a time")


def test_a_damaged_model_is_reported(open_file: Callable[..., Any], tmp_path: Path) -> None:
    bundled = ModelBundle.read(BUNDLED_MODEL)
    weights = dict(bundled.weights) | {"norm.weight": np.full(240, np.nan, np.float32)}
    model = dataclasses.replace(bundled, weights=weights, folder=None)
    page = open_file(write_page(model, tmp_path / "story.html"))
    page.get_by_role("button", name="Tell").click()
    page.get_by_text("The storyteller cannot go on: the numbers of this model are damaged").wait_for()
    assert page.get_by_role("button", name="Tell").is_visible()


def test_an_export_can_be_checked_by_a_browser(bundled_page: Path, storyteller: tinystories.Storyteller) -> None:
    """Where there is no Node.js."""
    request = Request(prompt='Once "upon" <b>', settings=storyteller.settings, seed=1, max_tokens=20)
    story = storyteller.generate(request.prompt, seed=1, max_tokens=20)
    (result,) = run_page(bundled_page, [request], ("browser", "chromium"))
    assert result == {"ids": list(story.ids), "text": story.continuation}
