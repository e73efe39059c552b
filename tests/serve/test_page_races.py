"""What is done in the pages while an answer about the state before is still on its way."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from serve_helpers import Running, Serve, wait_for_script

pytestmark = pytest.mark.browser

TEXT = "Lily had a red ball. Tom took the"
NEW_TEXT = "The dog was big. The dog saw a"
LONG_TEXT = "Once upon a time there was a cat. " * 12  # compressed in the fragment
Open = Callable[..., Any]


class Held:
    """Requests whose path ends so, from now on: they wait until they are released."""

    def __init__(self, page: Any, ending: str) -> None:
        self.page, self.routes, self.is_open = page, [], False  # type: ignore[var-annotated]
        page.route(f"**{ending}", self.take)

    def take(self, route: Any) -> None:
        if self.is_open:
            route.continue_()
        else:
            self.routes.append(route)

    def wait(self) -> None:
        """Wait until a request is held."""
        while not self.routes:
            self.page.wait_for_timeout(10)

    def release(self) -> None:
        self.is_open = True
        for route in self.routes:
            route.continue_()


def settle(page: Any) -> None:
    """Return once the page has drawn what it knows."""
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


def text_of(page: Any) -> str:
    return str(page.get_by_label("Your text").input_value())


def wait_for_bars(page: Any, text: str) -> Any:
    bars = page.locator(f'[data-text="{text}"] button.bar')
    bars.first.wait_for()
    return bars


def open_next(server: Running, open_page: Open, text: str = TEXT, state: str = "") -> Any:
    page = open_page(server, f"/lab#p=next&t={quote_plus(text)}{state}", allow="status of 400")
    wait_for_bars(page, text)
    return page


def first_labels(page: Any, n: int) -> str:
    """The text that is added by choosing the first bar so often."""
    text, start = text_of(page), text_of(page)
    for _ in range(n):
        text += wait_for_bars(page, text).first.locator(".label").inner_text().replace("·", " ")
        page.keyboard.press("1")
    wait_for_bars(page, text)
    for _ in range(n):
        page.keyboard.press("r")
    wait_for_bars(page, start)
    return text


# ---- Next word


def test_a_drawn_token_is_not_added_to_another_text(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    held = Held(page, "/lab/api/step")
    page.keyboard.press(" ")
    held.wait()
    page.get_by_label("Your text").fill(NEW_TEXT)
    wait_for_bars(page, NEW_TEXT)
    with page.expect_response("**/lab/api/step"):
        held.release()
    settle(page)
    assert "a=" not in page.evaluate("location.hash")
    wait_for_bars(page, NEW_TEXT)
    page.locator("section h2").click()
    page.keyboard.press(" ")  # the next draw is one from the new text
    page.get_by_text("of the line from 0 to 1").wait_for()
    assert text_of(page).startswith(NEW_TEXT)


def test_keys_wait_for_the_bars(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    expected = first_labels(page, 3)
    held = Held(page, "/lab/api/tokens")
    for _ in range(3):
        page.keyboard.press("1")
    held.wait()
    held.release()
    wait_for_bars(page, expected)


def test_draws_wait_for_the_draw_before(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page, state="&temp=0&rp=1")
    expected = first_labels(page, 2)
    held = Held(page, "/lab/api/step")
    page.keyboard.press(" ")
    page.keyboard.press(" ")
    held.wait()
    held.release()
    wait_for_bars(page, expected)


def test_tokens_are_taken_back_as_often_as_asked(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    held = Held(page, "/lab/api/tokens")
    for _ in range(3):
        page.keyboard.press("r")
    held.wait()
    held.release()
    wait_for_bars(page, "Lily had a red ball.")


def test_a_waiting_key_is_taken_back(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    expected = first_labels(page, 1)
    held = Held(page, "/lab/api/tokens")
    for key in ("1", "1", "r"):
        page.keyboard.press(key)
    held.wait()
    held.release()
    wait_for_bars(page, expected)
    settle(page)
    assert text_of(page) == expected


def test_waiting_keys_are_forgotten_with_their_text(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    held = Held(page, "/lab/api/tokens")
    page.keyboard.press("1")
    page.keyboard.press("1")
    page.keyboard.press(" ")
    held.wait()
    page.get_by_label("Your text").fill(NEW_TEXT)
    held.release()
    wait_for_bars(page, NEW_TEXT)
    settle(page)
    assert text_of(page) == NEW_TEXT


def test_figures_are_not_saved_with_the_numbers_of_another_text(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    held = Held(page, "/lab/api/next")
    save = page.locator("[data-figure='next-word']").get_by_role("button", name="JSON")
    assert save.is_enabled()
    page.get_by_label("Your text").fill(NEW_TEXT)
    held.wait()
    assert save.is_disabled()
    held.release()
    wait_for_bars(page, NEW_TEXT)
    assert save.is_enabled()


def test_the_python_of_another_text_is_not_left_there(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    page.get_by_role("button", name="Copy as Python").first.click()
    page.locator(".tools pre").wait_for()
    page.get_by_label("Your text").fill(NEW_TEXT)
    page.locator(".tools pre").wait_for(state="detached")


# ---- Words and Attention


def test_a_word_of_the_text_before_is_not_chosen_in_the_new_one(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=words&t={quote_plus(TEXT)}")
    page.locator(".total b").nth(2).wait_for()
    held = Held(page, "/lab/api/tokens")
    page.get_by_label("Your text").fill(f"{TEXT[:12]}{NEW_TEXT}")
    held.wait()
    page.locator("[data-index='6']").click()  # is not in the new text
    held.release()
    page.locator("[data-index='10']").wait_for()
    settle(page)
    assert "c=" not in page.evaluate("location.hash")
    assert page.locator(".token[aria-pressed=true]").count() == 0
    again = Held(page, "/lab/api/tokens")
    page.get_by_label("Your text").fill(f"{TEXT[:12]}{TEXT[12:]}")
    again.wait()
    page.locator("[data-index='2']").click()  # is in both
    again.release()
    page.locator("[data-index='2'][aria-pressed=true]").wait_for()


def test_a_branch_of_the_text_before_does_not_replace_the_new_one(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=words&t={quote_plus(TEXT)}")
    page.locator(".total b").nth(2).wait_for()
    page.locator("[data-index='5']").focus()
    page.locator("aside .choices button").first.wait_for()
    held = Held(page, "/lab/api/tokens")
    page.get_by_label("Your text").fill(NEW_TEXT)
    held.wait()
    page.locator("aside .choices button").first.click()
    held.release()
    page.locator(f"[data-index='{len(NEW_TEXT.split())}']").wait_for()
    assert text_of(page) == NEW_TEXT


@pytest.mark.parametrize("pane", ["words", "attention", "inside"])
def test_a_word_that_is_looked_at_may_vanish(lab_server: Running, open_page: Open, pane: str) -> None:
    page = open_page(lab_server, f"/lab#p={pane}&t={quote_plus(TEXT)}")
    ready = {"words": "aside .choices button", "attention": ".matrix canvas", "inside": ".lens td"}[pane]
    page.locator(ready).first.wait_for()
    page.locator(".lens button" if pane == "inside" else ".chips .token").last.focus()
    page.get_by_label("Your text").fill("A dog")
    last = page.locator("[data-cell='6.2']" if pane == "inside" else ".token[data-index='2']")
    last.wait_for()
    page.locator(".token[data-index='3'], [data-cell='6.3']").first.wait_for(state="detached")
    complete = {"words": ".total b >> nth=2", "attention": ".matrix canvas", "inside": ".chart circle"}[pane]
    page.locator(complete).first.wait_for()
    last.focus()
    if pane == "attention":
        page.get_by_text("“·dog” reads:").wait_for()


# ---- Questions


def test_a_question_that_was_replaced_may_fail(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    held = Held(page, "/lab/api/tokens")
    page.get_by_label("Your text").fill("A text that the server refuses")
    held.wait()
    page.get_by_label("Your text").fill(NEW_TEXT)
    settle(page)
    held.is_open = True
    held.routes[0].fulfill(status=400, json={"error": {"message": "no", "type": "x", "param": None, "code": None}})
    wait_for_bars(page, NEW_TEXT)
    assert page.get_by_role("alert").count() == 0


def test_of_two_ways_back_the_last_one_counts(lab_server: Running, open_page: Open) -> None:
    page = open_next(lab_server, open_page)
    page.get_by_label("Your text").fill(LONG_TEXT)
    wait_for_script(page, "location.hash.includes('z.')")
    long_hash = page.evaluate("location.hash")
    page.evaluate(
        """(hashes) => {
            for (const hash of hashes) {
                history.replaceState(null, '', hash);
                dispatchEvent(new PopStateEvent('popstate'));
            }
        }""",
        [long_hash, f"#p=next&t={quote_plus(NEW_TEXT)}"],
    )
    wait_for_bars(page, NEW_TEXT)
    page.evaluate(  # as much work as reading the fragment
        "hash => new Response(new Blob([hash]).stream().pipeThrough(new CompressionStream('gzip'))).text()", long_hash
    )
    settle(page)
    assert text_of(page) == NEW_TEXT


@pytest.mark.parametrize("module", ["experiments", "runs"])
def test_a_pane_that_could_not_be_loaded_is_loaded_again(lab_server: Running, open_page: Open, module: str) -> None:
    page = open_page(lab_server, f"/lab#p=words&t={quote_plus(TEXT)}", allow="ERR_FAILED")
    page.locator(".total b").nth(2).wait_for()
    page.route(f"**/page/{module}.js", lambda route: route.abort())
    page.get_by_role("button", name="Experiments").click()
    page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    page.unroute(f"**/page/{module}.js")
    page.get_by_role("button", name="Try again").click()
    page.locator(".duel li").first.wait_for()
    assert text_of(page) == TEXT
    assert page.get_by_role("alert").count() == 0


# ---- The tour


def test_a_guess_about_the_text_before_cannot_be_made(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#t={quote_plus(TEXT)}")
    page.get_by_role("button", name="Tour").click()
    guesses = page.locator(".guesses button")
    guesses.first.wait_for()
    held = Held(page, "/lab/api/tokens")
    page.get_by_label("Your text").fill(NEW_TEXT)
    held.wait()
    assert guesses.first.is_disabled()  # it would be thrown away with the old text
    held.release()
    guesses.first.click()
    page.locator(".tour button.primary").wait_for()


def test_a_text_that_is_being_typed_is_not_replaced_by_the_example(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#t={quote_plus(TEXT)}")
    page.get_by_role("button", name="Tour").click()
    page.locator(".guesses button").first.wait_for()
    page.get_by_label("Your text").fill("The dog")
    page.get_by_text("The tour asks about texts of 8 tokens or more").wait_for()
    assert text_of(page) == "The dog"
    page.get_by_label("Your text").fill(NEW_TEXT)
    page.locator(".guesses button").first.wait_for()


# ---- Training and Experiments


@pytest.fixture(scope="module")
def runs_server(serve_model: Serve, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("races") / "runs"
    for name in ("second", "first"):
        shutil.copytree(trained_run, root / name)
        (root / name / "metrics.jsonl").touch()
    with serve_model(precision="fp32", runs_folder=root, compare_model=trained_run, poll_s=0.05) as running:
        yield running


def test_the_run_that_is_looked_at_stays(runs_server: Running, open_page: Open) -> None:
    """Until one is chosen, the newest run is shown; what is chosen of it chooses the run, too."""
    page = open_page(runs_server, f"/lab#p=training&t={quote_plus(TEXT)}")
    page.get_by_role("heading", name="first", exact=True).wait_for()
    page.get_by_label("At each evaluation").fill("0")
    wait_for_script(page, "location.hash.includes('run=first')")
    page.goto("about:blank")


def test_a_search_does_not_change_the_run(
    serve_model: Serve, trained_run: Path, tmp_path: Path, open_page: Open
) -> None:
    for i in range(12):
        shutil.copytree(trained_run, tmp_path / f"run-{i:02}")
    shutil.copytree(trained_run, tmp_path / "zebra")
    (tmp_path / "zebra" / "metrics.jsonl").touch()
    with serve_model(runs_folder=tmp_path, poll_s=0.05) as running:
        page = open_page(running, f"/lab#p=training&t={quote_plus(TEXT)}")
        page.get_by_role("heading", name="zebra", exact=True).wait_for()
        page.get_by_label("Find by name").fill("run-03")
        page.get_by_text("1 run", exact=True).wait_for()
        settle(page)
        assert page.get_by_role("heading", name="zebra", exact=True).count() == 1
        page.goto("about:blank")


def test_a_checkpoint_is_chosen_together_with_its_run(serve_model: Serve, trained_run: Path, open_page: Open) -> None:
    """Until a model is chosen it is the newest run, which may be another one a moment later."""
    with serve_model(precision="fp32", runs_folder=trained_run.parent) as running:
        page = open_page(running, f"/lab#p=experiments&e=models&t={quote_plus(TEXT)}")
        page.get_by_label("Checkpoint", exact=True).select_option("4")
        page.get_by_role("heading", name="B: tiny, step 4").wait_for()
        wait_for_script(page, "location.hash.includes('m2=run+tiny&m2s=4')")
        page.goto("about:blank")


# ---- The storyteller


def test_the_link_is_that_of_the_newest_story(serve_script: Serve, open_page: Open) -> None:
    with serve_script(" was happy. The dog was happy.") as running:
        page = open_page(running)
        page.evaluate(
            """() => {
                const original = Response.prototype.arrayBuffer;
                Response.prototype.arrayBuffer = async function () {
                    await new Promise((done) => { window.release = done; });
                    return original.call(this);
                };
            }"""
        )
        page.get_by_label("How does the story begin?").fill(LONG_TEXT)
        page.get_by_role("button", name="Tell").click()
        wait_for_script(page, "'release' in window")
        page.get_by_label("How does the story begin?").fill("The cat")
        page.keyboard.press("Control+Enter")
        page.get_by_role("button", name="Copy").wait_for()
        page.evaluate("release()")
        settle(page)
        assert "b=The+cat&" in page.evaluate("location.hash")
        assert page.locator(".words").inner_text().startswith("The cat was happy.")


def test_the_beginning_of_a_story_stays_marked(serve_script: Serve, open_page: Open) -> None:
    with serve_script(" was happy. The dog was happy.") as running:
        page = open_page(running)
        page.get_by_label("How does the story begin?").fill("The cat")
        page.get_by_role("button", name="Tell").click()
        page.get_by_role("button", name="Copy").wait_for()
        assert page.locator(".word.given").all_inner_texts() == ["The", "cat"]
        page.get_by_label("How does the story begin?").fill("The next story begins like this")
        settle(page)
        assert page.locator(".word.given").all_inner_texts() == ["The", "cat"]
