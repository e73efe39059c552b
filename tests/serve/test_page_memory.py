"""The memory of a tab: after any number of stories and looks it holds what it held after the first ones."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from serve_helpers import Running, Serve, wait_for_script

pytestmark = pytest.mark.browser
log = logging.getLogger(__name__)

STORY = " was happy. Then a dog sat on a mat. The cat was happy. The dog was happy." * 6
MAX_MORE = {"Nodes": 60, "JSEventListeners": 30, "JSHeapUsedSize": 1_000_000}  # of what is kept
MINUTES = 10


class Meter:
    """What the tab holds after garbage has been collected."""

    def __init__(self, page: Any) -> None:
        self.session = page.context.new_cdp_session(page)
        self.session.send("Performance.enable")

    def read(self) -> dict[str, int]:
        for _ in range(3):  # what one collection frees may keep something else alive
            self.session.send("HeapProfiler.collectGarbage")
        metrics = {one["name"]: one["value"] for one in self.session.send("Performance.getMetrics")["metrics"]}
        return {name: int(metrics[name]) for name in MAX_MORE}

    def growth(self, before: dict[str, int]) -> dict[str, int]:
        """How much more than allowed there is, by kind; empty if nothing grew."""
        after = self.read()
        return {name: after[name] - before[name] for name in MAX_MORE if after[name] - before[name] > MAX_MORE[name]}


def tell_again(page: Any, n_stories: int) -> None:
    for _ in range(n_stories):
        page.get_by_role("button", name="Again").click()
        page.get_by_role("button", name="Stop").or_(page.get_by_role("button", name="Copy")).first.wait_for()
        page.get_by_role("button", name="Copy").wait_for()


def test_telling_keeps_nothing(serve_script: Serve, open_page: Callable[..., Any]) -> None:
    with serve_script(STORY) as running:
        page = open_page(running)
        page.get_by_text("long", exact=True).click()
        page.get_by_label("How does the story begin?").fill("The cat")
        page.get_by_role("button", name="Tell").click()
        page.get_by_role("button", name="Copy").wait_for()
        tell_again(page, 5)
        meter = Meter(page)
        before = meter.read()
        tell_again(page, 25)
        assert meter.growth(before) == {}


def test_looking_keeps_nothing(serve_model: Serve, open_page: Callable[..., Any]) -> None:
    ready = {
        "Words": ".total b >> nth=2",
        "Next word": "button.bar",
        "Attention": ".matrix canvas",
        "Inside": ".lens td",
    }

    def look(page: Any, n_rounds: int) -> None:
        for i in range(n_rounds):
            page.get_by_label("Your text").fill(f"Once upon a time there was a cat with {i % 5} hats. " * 3)
            for name, selector in ready.items():
                page.get_by_role("button", name=name).click()
                page.locator(selector).first.wait_for()
                if name == "Next word":
                    wait_for_script(page, "document.querySelector('.bars').dataset.text !== ''")
                    page.keyboard.press("1")
                    wait_for_script(page, "document.querySelectorAll('.tree button').length > 0")

    with serve_model() as running:
        page = open_page(running, "/lab#t=Once")
        look(page, 5)
        meter = Meter(page)
        before = meter.read()
        look(page, 10)
        assert meter.growth(before) == {}


@pytest.mark.slow
def test_ten_minutes_of_telling(lab_server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(lab_server, "/#b=The+little+fox&len=short&bold=2&s=7")
    page.get_by_role("button", name="Copy").wait_for()
    meter, started_at, n_stories = Meter(page), time.monotonic(), 0
    tell_again(page, 10)
    most_nodes = 0
    before = meter.read()
    while time.monotonic() < started_at + 60 * MINUTES:
        tell_again(page, 10)
        n_stories += 10
        most_nodes = max(most_nodes, meter.read()["Nodes"])
    after = meter.read()
    log.info("%d stories: %s, then %s; at most %d nodes", n_stories, before, after, most_nodes)
    # Stories have 60 to 100 words, each with two listeners and two nodes.
    assert after["JSHeapUsedSize"] - before["JSHeapUsedSize"] < MAX_MORE["JSHeapUsedSize"]
    assert after["JSEventListeners"] - before["JSEventListeners"] < 300
    assert most_nodes - before["Nodes"] < 500
