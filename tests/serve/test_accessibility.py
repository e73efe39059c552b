"""axe-core over the pages: every pane, in light and dark, on a desk and on a phone. Nothing serious or critical."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_helpers import is_missing
from conftest import Serve
from serve_helpers import Running, wait_for_script

pytestmark = pytest.mark.browser

HASH = "t=Lily+had+a+red+ball.+Tom+took+the+ball.+She+said%3A+%22Give+me+the"
# Where a page is, and what shows that it is complete.
PLACES = {
    "words": (f"/lab#p=words&{HASH}&c=17", ".tools button >> nth=3"),
    "next": (f"/lab#p=next&{HASH}", "button.bar >> nth=9"),
    "attention": (f"/lab#p=attention&{HASH}&off=2.3", "aside ol li >> nth=3"),
    "inside": (f"/lab#p=inside&{HASH}", ".lens td >> nth=9"),
    "training": (f"/lab#p=training&{HASH}", "section.pane p >> nth=1"),
    "experiments": (f"/lab#p=experiments&{HASH}", ".duel li >> nth=3"),
}
# The experiments by name, and what shows that one is complete.
EXPERIMENTS = {
    "Two texts": ".duel li",
    "Two models": ".duel li",
    "Which of two?": ".answers button:enabled",
    "Tokenizers": ".piece",
}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which the Python package axe-playwright-python brings along."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        is_missing("axe-playwright-python")
        raise AssertionError
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def findings(axe: str) -> Callable[[Any], list[str]]:
    """A function from a page to its serious and critical findings, one line each."""

    def check(page: Any) -> list[str]:
        page.evaluate("() => Promise.all(document.getAnimations().map((one) => one.finished.catch(() => {})))")
        page.evaluate(axe)
        violations = page.evaluate("async () => (await axe.run(document)).violations")
        return [
            f"{violation['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:300]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]

    return check


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_panes(
    lab_server: Running,
    open_page: Callable[..., Any],
    findings: Callable[[Any], list[str]],
    place: str,
    look: str,
) -> None:
    path, ready = PLACES[place]
    page = open_page(lab_server, path, **LOOKS[look])
    page.locator(ready).first.wait_for()
    if place == "next":  # with a path, a draw and endings
        page.keyboard.press(" ")
        page.get_by_text("of the line from 0 to 1").wait_for()
        page.locator(".tree button").first.wait_for()
        page.get_by_role("button", name="Tell 8 endings from here").click()
        page.locator(".endings details").nth(7).wait_for(timeout=120_000)
    if place not in ("training", "experiments"):
        page.get_by_role("button", name="Copy as Python").first.click()
        page.locator(".tools pre").first.wait_for()
    assert findings(page) == []


@pytest.mark.parametrize("look", LOOKS)
def test_a_run_and_all_experiments(
    serve_model: Serve,
    trained_run: Path,
    open_page: Callable[..., Any],
    findings: Callable[[Any], list[str]],
    look: str,
) -> None:
    with serve_model(runs_folder=trained_run.parent, compare_model=trained_run) as running:
        page = open_page(running, "/lab#p=training", **LOOKS[look])
        page.locator(".plot canvas").first.wait_for()
        page.locator(".reading .token").first.wait_for()
        assert findings(page) == []
        page.get_by_role("button", name="Experiments").click()
        for name, ready in EXPERIMENTS.items():
            page.get_by_role("radio", name=name, exact=True).check()
            page.locator(ready).first.wait_for()
            assert findings(page) == [], name
        page.goto("about:blank")  # the page would go on asking


@pytest.mark.parametrize("look", LOOKS)
def test_the_tour_the_help_and_a_problem(
    lab_server: Running, open_page: Callable[..., Any], findings: Callable[[Any], list[str]], look: str
) -> None:
    page = open_page(lab_server, "/lab", first_visit=True, **LOOKS[look])
    page.locator(".guesses button").first.wait_for()
    assert findings(page) == []
    page.locator(".guesses button").first.click()
    page.locator(".tour button.primary").wait_for()
    assert findings(page) == []
    page.get_by_role("button", name="Keys").click()
    page.locator("dialog[open]").wait_for()
    assert findings(page) == []


@pytest.fixture
def told_page(lab_server: Running, open_page: Callable[..., Any]) -> Callable[..., Any]:
    """The storyteller with a story."""

    def tell(**options: Any) -> Any:
        page = open_page(lab_server, "/#b=The+little+fox&len=short&bold=2&s=7", **options)
        page.get_by_role("button", name="Copy").wait_for(timeout=120_000)
        return page

    return tell


@pytest.mark.parametrize("look", LOOKS)
def test_the_storyteller(told_page: Callable[..., Any], findings: Callable[[Any], list[str]], look: str) -> None:
    page = told_page(**LOOKS[look])
    wait_for_script(page, "document.querySelectorAll('.cursor').length === 0")
    assert findings(page) == []


def test_axe_finds_what_is_wrong(
    lab_server: Running, open_page: Callable[..., Any], findings: Callable[[Any], list[str]]
) -> None:
    page = open_page(lab_server, f"/lab#p=words&{HASH}")
    page.locator(".tools button").first.wait_for()
    page.evaluate("document.querySelector('button.primary, .rail button').textContent = ''")
    page.evaluate("document.getElementById('text').labels[0].remove()")
    assert {line.partition(":")[0] for line in findings(page)} >= {"label"}
