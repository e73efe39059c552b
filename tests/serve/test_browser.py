"""The pages in Debian's chromium, driven by Playwright: streams, stops, keys, errors, phones and the lab's numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serve_helpers import Running, Serve, wait_for_script, wait_until

import tinystories

pytestmark = pytest.mark.browser

KEY = "a-long-enough-key"
STORY = " was happy. Then a dog sat on a mat. The cat was happy. The dog was happy." * 3
PANES = ("words", "next", "attention", "inside")
LONG_TEXT = "Lily had a red ball. Tom took the ball and ran to the park. " * 60  # more than the context


def story_of(page: Any) -> str:
    return " ".join(page.locator(".words").inner_text().split()) if page.locator(".words").count() else ""


def begin(page: Any, text: str = "The cat") -> None:
    page.get_by_label("How does the story begin?").fill(text)
    page.get_by_role("button", name="Tell").click()


def wait_for_end(page: Any) -> None:
    page.get_by_role("button", name="Copy").wait_for()


def test_a_story_grows_word_by_word_and_can_be_kept(
    serve_script: Serve, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    with serve_script(STORY) as running:
        page = open_page(running, permissions=["clipboard-read", "clipboard-write"])
        running.engine.close_gate()
        begin(page)
        lengths = []
        for _ in range(3):
            running.engine.allow(4)
            wait_for_script(
                page, "n => (document.querySelector('.words')?.innerText.length ?? 0) > n", arg=max([7, *lengths])
            )
            lengths.append(len(page.locator(".words").inner_text()))
        assert page.get_by_role("button", name="Stop").is_visible()
        assert lengths == sorted(set(lengths))
        running.engine.open_gate()
        wait_for_end(page)
        assert story_of(page) == f"The cat{STORY}".strip()
        page.get_by_role("button", name="Copy").click()
        page.get_by_text("Copied.").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == f"The cat{STORY}"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save").click()
        download.value.save_as(tmp_path / "story.txt")
        assert (tmp_path / "story.txt").read_text(encoding="utf-8") == f"The cat{STORY}\n"
        assert page.locator("[aria-live]").inner_text().strip().endswith("happy.")


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_stopping_and_leaving_free_the_slot(serve_chaotic: Serve, open_page: Callable[..., Any], way: str) -> None:
    with serve_chaotic(n_ctx=2048) as running:
        page = open_page(running)
        page.get_by_text("long", exact=True).click()
        running.engine.close_gate()
        begin(page)
        running.engine.allow(3)
        wait_until(lambda: len(running.engine.calls) == 3 and running.engine.is_waiting)
        if way == "stop":
            page.get_by_role("button", name="Stop").click()
        else:
            page.goto("about:blank")
        wait_until(lambda: running.scheduler.canceled)
        running.engine.allow(1)
        wait_until(lambda: running.endings() == {"client_gone": 1})
        assert running.scheduler.n_busy == 0


def test_a_link_tells_the_same_story(lab_server: Running, open_page: Callable[..., Any]) -> None:
    first = open_page(lab_server)
    first.get_by_text("short", exact=True).click()
    begin(first, "The little fox")
    wait_for_end(first)
    text, url = story_of(first), first.url
    assert text.startswith("The little fox")
    assert text[-1] in '.!?"”'
    second = open_page(lab_server, f"/#{urlsplit(url).fragment}")
    wait_for_end(second)
    assert story_of(second) == text
    second.get_by_role("button", name="Again").click()
    wait_for_script(second, "url => location.href !== url", arg=url)


def test_a_beginning_is_never_cut(lab_server: Running, open_page: Callable[..., Any]) -> None:
    """A short story has 60 words; after a longer beginning it ends with the next sentence."""
    page = open_page(lab_server)
    page.get_by_text("short", exact=True).click()
    beginning = ("Tom saw a dog. The dog was big. " * 12).rstrip()
    begin(page, beginning)
    wait_for_end(page)
    assert story_of(page).startswith(beginning)
    assert len(story_of(page)) > len(beginning)


def test_the_storyteller_by_keyboard_alone(serve_script: Serve, open_page: Callable[..., Any]) -> None:
    with serve_script(STORY) as running:
        page = open_page(running, allow="501")  # the lab of a scripted engine has no weights to show
        page.get_by_role("button", name="Tell").wait_for()
        for _ in range(3):  # the link to the lab, light or dark, the text
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "beginning"
        page.keyboard.press("Control+A")
        page.keyboard.type("The dog")
        page.keyboard.press("Control+Enter")
        wait_for_end(page)
        while page.evaluate("document.activeElement.className") != "word given":
            page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.innerText") == "was"
        page.keyboard.press("Enter")
        page.wait_for_url("**/lab#*")
        assert page.get_by_label("Your text").input_value() == f"The dog{STORY}"
        page.wait_for_load_state("networkidle")  # the lab asks the server, which ends now


def test_a_locked_server_asks_for_its_key(serve_script: Serve, open_page: Callable[..., Any]) -> None:
    with serve_script(STORY, keys=(KEY,)) as running:
        page = open_page(running, allow="401")
        begin(page)
        page.get_by_label("Which key opens it?").fill("not the right key")
        page.get_by_role("button", name="Open").click()
        page.get_by_label("Which key opens it?").wait_for()
        page.get_by_label("Which key opens it?").fill(KEY)
        page.get_by_role("button", name="Open").click()
        wait_for_end(page)
        assert story_of(page).startswith("The cat was happy.")
        page.reload()
        wait_for_end(page)  # the key is kept for this tab, and the link tells the story
        assert KEY not in page.url
        assert page.evaluate("localStorage.length") == 0


def test_a_busy_server_is_explained(serve_chaotic: Serve, open_page: Callable[..., Any]) -> None:
    with serve_chaotic(n_slots=1, n_queued=0) as running:
        page = open_page(running, allow="429")
        running.engine.close_gate()
        with running.client.open_stream(prompt="A", max_tokens=50):
            wait_until(lambda: running.engine.is_waiting)
            begin(page)
            page.get_by_role("alert").filter(has_text="Many stories are being told").wait_for()
        running.engine.open_gate()


def test_a_server_that_goes_away_and_comes_back(serve_script: Serve, open_page: Callable[..., Any]) -> None:
    with serve_script(STORY) as running:
        page = open_page(running, allow="ERR_")
        port = running.port
        page.get_by_role("button", name="Tell").wait_for()
    begin(page)
    page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    with serve_script(STORY, port=port):
        page.get_by_role("button", name="Tell").click()
        wait_for_end(page)
        assert page.get_by_role("alert").count() == 0


def test_words_have_the_numbers_of_the_python_api(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Callable[..., Any]
) -> None:
    text = "Lily had a red ball. Tom took the ball."
    trace = storyteller.trace(text)
    page = open_page(lab_server, "/lab")
    page.get_by_label("Your text").fill(text)
    page.locator(".total b").filter(has_text=f"{trace.bits_per_byte:.3f}").wait_for()
    for i in range(1, len(trace.ids)):
        title = page.locator(f"[data-index='{i}']").get_attribute("title")
        assert float(title.split(" bits")[0]) == pytest.approx(trace.surprise_bits[i], abs=0.006)
        assert title.endswith(f"guess number {trace.ranks[i]}")
    page.locator("[data-index='4']").click()
    assert page.locator("aside dd").first.inner_text() == str(trace.ids[4])
    other = page.locator("aside .choices button").nth(1)
    label = other.locator("span").first.inner_text()
    other.click()  # cut here and branch
    wait_for_script(
        page,
        "(text) => document.getElementById('text').value === text && location.hash.includes('a=')",
        "Lily had a" + label.replace("·", " "),
    )
    page.go_back()
    wait_for_script(page, "text => document.getElementById('text').value === text", arg=text)


def test_next_word_by_mouse_and_keyboard(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Callable[..., Any]
) -> None:
    text = "Lily had a red"
    page = open_page(lab_server, "/lab#p=next&t=Lily+had+a+red&temp=1&seed=7")
    bars = page.locator(f"[data-text='{text}'] button.bar")
    bars.first.wait_for()
    candidates = tinystories.Storyteller.next_token(storyteller, text, temperature=1.0).candidates(3)
    assert int(bars.first.get_attribute("data-id")) == candidates[0].id
    first_label = bars.first.locator(".label").inner_text()
    second_label = bars.nth(1).locator(".label").inner_text()
    value = page.get_by_label("Your text")
    page.keyboard.press("2")
    page.locator(f"[data-text='{text}{second_label.replace('·', ' ')}']").wait_for()
    page.keyboard.press("r")
    page.locator(f"[data-text='{text}']").wait_for()
    bars.first.click()
    page.locator(f"[data-text='{text}{first_label.replace('·', ' ')}']").wait_for()
    page.go_back()
    page.locator(f"[data-text='{text}']").wait_for()
    page.locator("section h2").click()
    page.keyboard.press(" ")
    page.get_by_text("of the line from 0 to 1").wait_for()
    assert value.input_value().startswith(text)
    page.keyboard.press("r")
    page.locator(f"[data-text='{text}']").wait_for()
    page.get_by_label("Top-k").fill("1")
    page.get_by_text("1 of 4096 tokens may be drawn").wait_for()
    assert page.locator(".bar.cut").count() == 12
    wait_for_script(page, "location.hash.includes('k=1')")


def test_attention_and_ablation(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Callable[..., Any]
) -> None:
    text = "Lily had a red ball."
    trace = storyteller.trace(text)
    page = open_page(lab_server, "/lab#p=attention&t=Lily+had+a+red+ball.&l=2&h=3")
    page.locator(".thumbs button").first.wait_for()
    assert page.locator(".thumbs button").count() == 36
    last = len(trace.ids) - 1
    byte = trace.attention_bytes(2)[3, last, last - 1]
    wait_for_script(page, "document.querySelectorAll('.chips [title$=\"%\"]').length > 3")
    shown = page.locator(f"[data-index='{last - 1}']").get_attribute("title")
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * (byte / 255) ** 2, abs=0.06)
    page.locator("section h2").click()
    for key, title in (
        ("]", "Layer 3, head 3"),
        (".", "Layer 3, head 4"),
        ("[", "Layer 2, head 4"),
        (",", "Layer 2, head 3"),
    ):
        page.keyboard.press(key)
        page.get_by_role("heading", name=title, exact=True).wait_for()
    page.get_by_role("button", name="Switch off layer 2, head 3").press("Enter")
    cost = trace.ablate([(2, 3)]).mean_bits
    page.locator(".facts dd").nth(1).filter(has_text=f"{cost:.2f} bits").wait_for()  # before, after, difference
    page.get_by_role("button", name="All on").press("Enter")
    page.get_by_role("button", name="Switch off layer 2, head 3").wait_for()


def test_inside(lab_server: Running, storyteller: tinystories.Storyteller, open_page: Callable[..., Any]) -> None:
    trace = storyteller.trace("Lily had a red ball.")
    lens = trace.logit_lens(top=1)
    page = open_page(lab_server, "/lab#p=inside&t=Lily+had+a+red+ball.")
    page.locator(".lens td").first.wait_for()
    for stage in (0, 3, 6):
        title = page.locator(f"[data-cell='{stage}.2']").get_attribute("title")
        label = tinystories.Storyteller.trace(storyteller, [int(lens.top_ids[stage, 2, 0])]).labels[0]
        assert title.startswith(label + " ")
    cell = page.locator("[data-cell='6.2']")
    cell.focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.cell") == "5.2"
    page.get_by_role("heading", name="layer 4, after").wait_for()
    assert page.locator("aside dd").first.inner_text() == str(lens.final_ranks[5, 2])


@pytest.mark.parametrize("pane", PANES)
def test_the_lab_by_keyboard_on_phones_in_the_dark_and_with_long_texts(
    lab_server: Running, open_page: Callable[..., Any], pane: str
) -> None:
    page = open_page(
        lab_server, "/lab", viewport={"width": 390, "height": 844}, color_scheme="dark", reduced_motion="reduce"
    )
    page.get_by_label("Your text").fill(LONG_TEXT)
    page.get_by_text("are beyond its context").wait_for()
    name = {"words": "Words", "next": "Next word", "attention": "Attention", "inside": "Inside"}[pane]
    while not page.evaluate("document.activeElement.innerText ?? ''").startswith(name):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    ready = {"words": ".total b >> nth=2", "next": ".bars button", "attention": ".thumbs button", "inside": ".lens td"}
    page.locator(ready[pane]).first.wait_for()
    wait_for_script(page, "document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(int(part) < 60 for part in background.removeprefix("rgb(").removesuffix(")").split(","))
    wait_for_script(page, "location.hash.includes('z.')")  # the text is compressed
    page.reload()
    page.locator(ready[pane]).first.wait_for()
    assert page.get_by_label("Your text").input_value() == LONG_TEXT


def test_the_lab_of_a_locked_server(serve_model: Serve, open_page: Callable[..., Any]) -> None:
    with serve_model(keys=(KEY,)) as running:
        page = open_page(running, "/lab#t=Once+upon", allow="401")
        page.get_by_label("needs its key").fill(KEY)
        page.get_by_role("button", name="Open").click()
        page.locator(".total b").nth(2).wait_for()


def test_the_lab_when_its_server_goes_away(serve_model: Serve, open_page: Callable[..., Any]) -> None:
    with serve_model() as running:
        page = open_page(running, "/lab#t=Once+upon", allow="ERR_")
        page.locator(".total b").nth(2).wait_for()
        port = running.port
    page.get_by_label("Your text").fill("A dog")
    page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    with serve_model(port=port):
        page.get_by_role("button", name="Try again").click()
        page.locator("[data-index='2']").wait_for()
        wait_for_script(page, "document.querySelectorAll('[role=alert]').length === 0")
