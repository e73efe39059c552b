"""The controls of an exported page with odd input, and with the keyboard alone."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser_page import finish, squeeze, start, story_of, tell, write_page

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.formats.bundle import ModelBundle

pytestmark = pytest.mark.browser

Open = Callable[..., Any]


def is_focused(page: Any, name: str) -> bool:
    return bool(page.get_by_role("button", name=name).evaluate("button => button === document.activeElement"))


def test_the_focus_goes_from_tell_to_stop_and_to_the_story(open_file: Open, bundled_page: Path) -> None:
    """Not to Tell: whoever presses Stop as the story ends must not begin another one."""
    page = open_file(bundled_page)
    page.evaluate("window.allow(0)")
    page.get_by_role("button", name="Tell").focus()
    page.keyboard.press("Enter")
    assert is_focused(page, "Stop")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Copy").wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "The story"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "word given"
    page.get_by_role("button", name="Again").focus()
    page.keyboard.press("Enter")
    page.locator("[data-held]").wait_for()
    assert is_focused(page, "Stop")
    finish(page)  # the story ends by itself
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "The story"


def test_a_word_can_be_reached_if_the_story_begins_with_spaces(open_file: Open, bundled_page: Path) -> None:
    page = open_file(bundled_page)
    start(page, 1, beginning="\n  Tom had")
    page.get_by_role("button", name="Stop").click()
    assert page.locator(".word[tabindex='0']").all_inner_texts() == ["Tom"]


def test_a_beginning_is_never_cut(open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller) -> None:
    """A short story has 60 words; after a beginning of 240 it ends with the next sentence."""
    page = open_file(bundled_page)
    beginning = ("Tom saw a dog. The dog was big. " * 30).rstrip()
    story = tell(page, 5, beginning=beginning, length="short")
    assert story.startswith(beginning)
    assert len(story) > len(beginning)
    assert squeeze(storyteller.generate(beginning, seed=5, max_tokens=900).text).startswith(story)


@pytest.mark.parametrize(
    "beginning",
    ["Tom  said:\n\n 'Oh!'  \"Yes\" $HOME `x` \\n", "-x", "Ein Café 🙂👩\u200d👧 日本\u00a0語", "<b>&amp;</script>"],
)
def test_the_command_has_the_beginning_as_it_is(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller, beginning: str
) -> None:
    """With all spaces and line breaks also where it is shown, and so when it is copied from there."""
    page = open_file(bundled_page)
    story = tell(page, 7, beginning=beginning)
    assert story == squeeze(storyteller.generate(beginning, seed=7, max_tokens=900).text)
    command = shlex.split(page.locator(".command").inner_text())
    assert command == ["tinystories", "generate", "--seed", "7", "--max-tokens", "900", "--prompt", beginning]


def test_a_beginning_with_nul_has_no_command(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller
) -> None:
    """It can come with a link; no command line can pass it on."""
    page = open_file(bundled_page, f"#b={quote('A' + chr(0) + 'B')}&len=long&s=3")
    page.get_by_role("button", name="Copy").wait_for()
    assert story_of(page) == squeeze(storyteller.generate("A\0B", seed=3, max_tokens=900).text)
    assert not page.locator(".command").is_visible()


@pytest.mark.parametrize("seed", ["0", "007", " 12 ", "9" * 20])
def test_seeds_that_are_whole_numbers(
    open_file: Open, bundled_page: Path, storyteller: tinystories.Storyteller, seed: str
) -> None:
    page = open_file(bundled_page)
    assert tell(page, seed) == squeeze(storyteller.generate(seed=int(seed), max_tokens=900).text)


def test_other_seeds_are_refused_and_the_story_goes_on(open_file: Open, bundled_page: Path) -> None:
    page = open_file(bundled_page)
    start(page, 12)
    for seed in ("-5", "1.5", "1e3", "x"):
        page.get_by_label("Seed").fill(seed)
        page.get_by_label("How does the story begin?").press("Control+Enter")
        assert not page.get_by_label("Seed").evaluate("input => input.validity.valid")
        assert page.get_by_role("button", name="Stop").is_visible()
    assert finish(page).startswith("Once upon a time, there was")


@pytest.mark.parametrize("width", [375, 1000])
def test_nothing_is_wider_than_its_place(open_file: Open, tmp_path: Path, width: int) -> None:
    """Long words in the title and in the beginning; and the longest numbers beside the bars."""
    word = "W" * 200
    model = dataclasses.replace(ModelBundle.read(BUNDLED_MODEL), title=word, license=word)
    page = open_file(write_page(model, tmp_path / "story.html"), viewport={"width": width, "height": 812})
    start(page, 1, beginning=word, n_tokens=3)
    page.get_by_role("button", name="Stop").click()
    assert story_of(page).startswith(word)
    page.locator(".about summary").click()
    page.locator(".next summary").click()
    page.get_by_role("slider", name="Temperature").fill("0")
    page.get_by_text("cut: temperature").nth(5).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """bars => [...bars.querySelectorAll('.number')].filter((number) => {
      const text = document.createRange();
      text.selectNodeContents(number);
      return text.getBoundingClientRect().right > bars.getBoundingClientRect().right + 1;
    }).map((number) => number.textContent)"""
    assert page.locator(".bars").evaluate(outside) == []
