"""What is done on an exported page while a story, an answer or an address is still on its way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser_page import bars_of, finish, settle, squeeze, start, story_of, tell, wait_for_text

import tinystories

pytestmark = pytest.mark.browser

Open = Callable[..., Any]
LONG = "Once upon a time there was a cat. " * 12  # compressed in the address


def whole_story(storyteller: tinystories.Storyteller, seed: int, beginning: str = "") -> str:
    return squeeze(storyteller.generate(beginning, seed=seed, max_tokens=900).text)


def test_the_newest_of_several_stories_is_told(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    """Tell, Stop and Tell again in a row, also before the weights are read."""
    page = open_file(bundled_page)
    page.evaluate("window.allow(0)")  # none ends before it is stopped
    page.locator(".segments").get_by_text("long").click()
    for seed in range(6):
        page.get_by_label("How does the story begin?").fill(LONG if seed % 2 else "")
        page.get_by_label("Seed").fill(str(seed))
        page.get_by_role("button", name="Tell").click()
        if seed < 5:
            page.get_by_role("button", name="Stop").click()
    finish(page)
    assert story_of(page) == whole_story(storyteller, 5, LONG.rstrip())


def test_the_address_is_that_of_the_newest_story(open_file: Open, bundled_page: Path) -> None:
    """Also if that of a long beginning is still being compressed."""
    page = open_file(bundled_page)
    page.evaluate(
        """() => {
          const { arrayBuffer } = Response.prototype;
          const isReleased = new Promise((resolve) => { window.release = resolve; });
          Response.prototype.arrayBuffer = async function () {
            const bytes = await arrayBuffer.call(this);
            document.documentElement.dataset.packed = '';
            await isReleased;
            return bytes;
          };
        }"""
    )
    start(page, 1, beginning=LONG)
    page.locator("[data-packed]").wait_for()
    page.get_by_role("button", name="Stop").click()
    start(page, 2, beginning="Tom")
    page.evaluate("window.release()")
    settle(page)
    assert page.evaluate("location.hash").startswith("#b=Tom&")


def test_a_chosen_word_stays_chosen_when_the_story_ends(open_file: Open, bundled_page: Path) -> None:
    """And at the end of the next story the pane shows what could come after that."""
    page = open_file(bundled_page)
    start(page, 12, n_tokens=14)
    page.locator(".word", has_text="upon").first.click()
    wait_for_text(page, "Once")
    page.locator("button.bar").first.click()
    wait_for_text(page, "Once upon")
    finish(page)
    settle(page)
    wait_for_text(page, "Once upon")
    page.get_by_role("button", name="Again").click()
    page.get_by_role("button", name="Copy").wait_for()
    page.locator(".tail", has_text=story_of(page)[-20:]).wait_for()


def test_a_story_goes_on_while_words_are_chosen_and_drawn(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    page = open_file(bundled_page)
    start(page, 12, n_tokens=14)
    for word, text in (("upon", "Once"), ("time", "Once upon a"), ("was", "Once upon a time, there")):
        page.locator(".word", has_text=word).first.click()
        page.evaluate("window.allow(3)")
        wait_for_text(page, text)
        page.keyboard.press(" ")  # draws
        page.locator(".strip").wait_for()
    assert finish(page) == whole_story(storyteller, 12)
    assert len(bars_of(page)) in (12, 13)


def test_the_focus_stays_on_a_word_that_grows(open_file: Open, bundled_page: Path) -> None:
    page = open_file(bundled_page)
    start(page, 12, n_tokens=1)
    page.locator(".word").first.focus()
    for _ in range(12):  # the last word, again and again
        page.keyboard.press("End")
        page.evaluate("window.allow(1)")
        settle(page)
        assert page.evaluate("document.activeElement.className") == "word"
    assert page.locator(".word[tabindex='0']").count() == 1
    assert story_of(page).startswith("Once upon a time, there was")


def test_what_a_stopped_story_reports_does_not_stop_the_next(open_file: Open, bundled_page: Path) -> None:
    page = open_file(bundled_page)
    start(page, 12)
    page.get_by_role("button", name="Stop").click()
    start(page, 12)
    page.evaluate("window.deliver({ id: 1, failure: 'of the first story' })")
    page.evaluate("window.deliver({ id: 1, text: ' of the first story', reason: 'end' })")
    page.evaluate("window.allow(2)")
    page.locator(".words", has_text="Once upon").wait_for()
    assert story_of(page) == "Once upon"
    assert page.get_by_role("alert").count() == 0
    assert page.get_by_role("button", name="Stop").is_visible()


def test_links_in_the_address_of_the_open_page(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    """Pasted, by the back button, and by a reload; the newest of two counts, also if the first takes longer to read."""
    page = open_file(bundled_page)

    def wait_for_story(seed: int, beginning: str) -> None:
        page.locator(".command", has_text=f"--seed {seed} ").wait_for()
        assert story_of(page) == whole_story(storyteller, seed, beginning)
        assert page.get_by_label("How does the story begin?").input_value() == beginning
        assert page.get_by_label("Seed").input_value() == str(seed)

    tell(page, 3, beginning=LONG)
    packed = page.evaluate("location.hash").replace("s=3", "s=4")
    link = f"#b={quote('The fox')}&len=long&bold=2&s="
    page.evaluate(f"() => {{ location.hash = {json.dumps(packed)}; location.hash = {json.dumps(link + '5')}; }}")
    wait_for_story(5, "The fox")
    page.evaluate(f"() => {{ location.hash = {json.dumps(link + '6')}; }}")
    wait_for_story(6, "The fox")
    page.go_back()
    wait_for_story(5, "The fox")
    page.reload()
    wait_for_story(5, "The fox")


def test_the_pane_follows_the_beginning_until_a_story_is_told(open_file: Open, bundled_page: Path) -> None:
    page = open_file(bundled_page, "#b=Tom+had")
    page.locator(".next summary").click()
    wait_for_text(page, "Tom had")
    page.get_by_label("How does the story begin?").fill("Lily saw a ")
    wait_for_text(page, "Lily saw a")
    page.get_by_role("button", name="The little fox").click()
    wait_for_text(page, "The little fox could not sleep.")
    tell(page, 1, beginning="Tom", length="short")
    page.get_by_label("How does the story begin?").fill("Ben")
    settle(page)
    assert page.locator(".tail", has_text=story_of(page)[-20:]).is_visible()


def test_a_page_that_cannot_be_opened_says_so_once(open_file: Open, bundled_page: Path, tmp_path: Path) -> None:
    """And offers nothing that would wait forever. The parts of the weights that follow fail too."""
    html = bundled_page.read_text(encoding="utf-8")
    before, name, after = html.partition('"weight_bytes":')
    path = tmp_path / "story.html"
    path.write_text(f"{before}{name}9{'0' * 14}{after}", encoding="utf-8")
    page = open_file(path, "#b=Tom&s=1")
    page.get_by_role("alert").wait_for()
    settle(page)
    text = page.get_by_role("alert").inner_text()
    assert text.startswith(
        "The storyteller cannot be opened; perhaps this browser does not have enough memory for it: "
    )
    assert "null" not in text
    assert page.get_by_role("button", name="Tell").is_disabled()
    page.get_by_label("How does the story begin?").press("Control+Enter")
    settle(page)
    assert page.get_by_role("button", name="Stop").count() == 0
    assert page.get_by_role("alert").is_visible()
