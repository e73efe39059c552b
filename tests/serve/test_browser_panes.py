"""The panes Training and Experiments in a browser: by mouse, by keyboard alone, live, on phones and in the dark."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_plus

import pytest
from command_line import PROGRAM
from serve_helpers import PATIENCE_S, Running, Serve, wait_for_script, wait_until

import tinystories
from tinystories.serve.lab.quiz import build_quiz

pytestmark = pytest.mark.browser

KEY = "a-long-enough-key"
TEXT = "Once upon a time there was a cat."
EXPERIMENTS = {"prompts": "Two texts", "models": "Two models", "quiz": "Which of two?", "tokens": "Tokenizers"}
# What shows that a pane or an experiment is complete.
READY = {"training": ".reading .token", "prompts": ".duel", "models": ".duel", "quiz": ".passage", "tokens": ".piece"}
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "reduced_motion": "reduce"}


@pytest.fixture(scope="module")
def runs_server(serve_model: Serve, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A small model, two runs, and a second model."""
    root = tmp_path_factory.mktemp("panes") / "runs"
    shutil.copytree(trained_run, root / "first")
    shutil.copytree(trained_run, root / "second")
    for name, seconds in (("second", 1e9), ("first", 2e9)):  # the order of the list
        os.utime(root / name / "metrics.jsonl", (seconds, seconds))
    with serve_model(precision="fp32", runs_folder=root, compare_model=trained_run, poll_s=0.05) as running:
        yield running


def state_of(page: Any) -> dict[str, str]:
    """The fragment of the URL, asked of the page: `page.url` is old until Playwright hears of a change."""
    pairs = [part.partition("=") for part in page.evaluate("location.hash").removeprefix("#").split("&")]
    return {name: unquote_plus(value) for name, _, value in pairs}


def expect_state(page: Any, **values: str | None) -> None:
    wait_until(lambda: all(state_of(page).get(name) == value for name, value in values.items()))


def focus_by_tab(page: Any, condition: str) -> None:
    """Press Tab until JavaScript says of the focused element `e` that it is the right one."""
    for _ in range(120):
        if page.evaluate(f"(e => {condition})(document.activeElement)"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {condition}")


def percent(prob: float) -> str:
    """A probability as the page writes it."""
    return f"{100 * prob:.{2 if prob < 0.1 else 1}f} %"


def n_points(page: Any) -> int:
    """How many points the first line of the first chart has."""
    return int(page.locator(".plot").first.get_attribute("data-points").split(",")[0])


@contextlib.contextmanager
def training(data: Path, run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training in a process of its own, which goes on until it is stopped."""
    settings = {
        "model.n_ctx": 32,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.n_embd": 16,
        "model.n_ff": 32,
        "train.steps": 1_000_000,
        "train.batch_size": 2,
        "train.micro_batch": 2,
        "train.log_every": 1,
        "train.eval_every": 60,
        "train.checkpoint_every": 60,
        "train.keep_checkpoints": 100_000,
        "train.eval_stories": 2,
        "train.sample_tokens": 8,
        "train.device": "cpu",
        "train.precision": "fp32",
        "train.compile": "off",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", PROGRAM, "train", "--config", "nano", "--data", str(data), "--out", str(run)]
    with run.with_suffix(".log").open("wb") as log:  # not a pipe, which would fill up
        process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_training_appears_and_grows_while_one_looks(
    serve_model: Serve, sample_data: Path, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    with serve_model(runs_folder=root, poll_s=0.05) as running:
        page = open_page(running, f"/lab#p=training&t={quote(TEXT)}", allow="404")  # of the run that is removed
        streams: list[str] = []
        page.on("request", lambda request: "/metrics" in request.url and streams.append(request.url))
        page.get_by_text("There are no runs in this folder yet").wait_for()
        with training(sample_data, root / "live") as process:
            wait_until(lambda: (root / "live").exists() or process.poll() is not None)
            assert process.poll() is None, (root / "live.log").read_text()
            page.get_by_role("heading", name="live", exact=True).wait_for()
            for _ in range(3):
                n_before = n_points(page)
                wait_until(lambda n=n_before: n_points(page) > n)
            page.get_by_text("training now").wait_for()
            sample = page.get_by_label("At each evaluation")
            wait_until(lambda: int(sample.get_attribute("max")) >= 1)
            sample.fill("0")
            expect_state(page, s="60")
            page.get_by_text("after 60 steps").first.wait_for()
            text = (root / "live" / "samples.md").read_text(encoding="utf-8").split("## Step 120")[0]
            story = page.locator("blockquote").first.inner_text()
            assert f"> {story.splitlines()[0]}" in text
            n_before = n_points(page)
            wait_until(lambda: n_points(page) > n_before)  # it has gone on meanwhile
        assert len(streams) == 1  # one connection, from the first point to the last
        shutil.rmtree(root / "live")
        page.get_by_text("was removed").first.wait_for()
        page.goto("about:blank")  # it would ask the server, which ends now


def test_curves_by_mouse(runs_server: Running, trained_run: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, "/lab#p=training")
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "loss" in record]
    scores = [record for record in records if "val_bits_per_byte" in record and not record.get("final")]
    plot = page.locator(".plot").first
    plot.locator("canvas").wait_for()
    wait_until(lambda: plot.get_attribute("data-points") == f"{len(train)},{len(scores)}")
    output = page.locator("output[for=at]")
    assert output.inner_text().startswith(f"step 12: {train[-1]['bits_per_byte']:.3f} bits per byte")
    page.get_by_role("radio", name="loss", exact=True).check()
    page.get_by_role("radio", name="minutes", exact=True).check()
    expect_state(page, y="loss", x="minutes")
    box = plot.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 40)
    expect_state(page, at="2")
    assert f"loss {train[0]['loss']:.3f}" in output.inner_text()
    page.get_by_label("compare second").check()
    page.get_by_role("heading", name="first and second").wait_for()
    expect_state(page, **{"run": "first", "with": "second"})
    page.locator(".facts-table tbody tr").nth(1).wait_for()
    wait_until(lambda: plot.get_attribute("data-points") == ",".join([f"{len(train)},{len(scores)}"] * 2))
    page.get_by_text("So far first is better, by 0.000 bits").wait_for()
    page.reload()
    page.get_by_role("heading", name="first and second").wait_for()
    page.get_by_role("button", name="second").click()
    expect_state(page, **{"run": "second", "with": None})
    page.get_by_text("As a table").first.click()
    assert page.locator("details[open] tbody tr").count() == len(train) + len(scores)


def test_a_text_is_read_by_each_checkpoint(
    runs_server: Running, trained_run: Path, open_page: Callable[..., Any]
) -> None:
    page = open_page(runs_server, f"/lab#p=training&t={quote(TEXT)}")
    slider = page.get_by_label("Checkpoint", exact=True)
    slider.wait_for()
    for place, step in enumerate((4, 8, 12)):
        folder = trained_run / "checkpoints" / f"step-{step:07d}"
        trace = tinystories.load(folder, engine="cpu", precision="fp32", threads=1).trace(TEXT)
        slider.fill(str(place))
        page.locator(f".reading[data-step='{step}']").wait_for()
        assert page.locator(".reading .total b").first.inner_text() == f"{trace.bits_per_byte:.3f}"
        for i in range(1, len(trace.ids)):
            title = page.locator(f".reading [data-index='{i}']").get_attribute("title")
            assert float(title.split(" bits")[0]) == pytest.approx(trace.surprise_bits[i], abs=0.006)
    page.get_by_text("3 checkpoints are kept. This run keeps the newest 9 and the best one").wait_for()
    page.get_by_text("The checkpoints looked at so far").click()
    assert page.locator("details[open] tbody tr").count() == 3


def test_training_by_keyboard_alone(runs_server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, "/lab")
    page.locator(".token").first.wait_for()
    focus_by_tab(page, "e.innerText?.startsWith('Training')")
    page.keyboard.press("Enter")
    page.locator(".plot canvas").first.wait_for()
    focus_by_tab(page, "e.matches('.runs button') && e.innerText.includes('second')")
    page.keyboard.press("Enter")
    expect_state(page, run="second")
    page.get_by_role("heading", name="second", exact=True).wait_for()
    focus_by_tab(page, "e.name === 'measure'")
    page.keyboard.press("ArrowRight")
    expect_state(page, y="loss")
    focus_by_tab(page, "e.name === 'axis'")
    page.keyboard.press("ArrowRight")
    expect_state(page, x="tokens")
    focus_by_tab(page, "e.id === 'at'")
    page.keyboard.press("ArrowLeft")
    expect_state(page, at="10")
    focus_by_tab(page, "e.id === 'sample'")
    page.keyboard.press("Home")
    expect_state(page, s="4")
    focus_by_tab(page, "e.id === 'checkpoint'")
    page.keyboard.press("Home")
    expect_state(page, ck="4")
    page.locator(".reading[data-step='4']").wait_for()
    focus_by_tab(page, "e.matches('.reading .token')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "bits" in page.locator(".reading .total").inner_text().split("·")[1]


@pytest.mark.parametrize("pane", ["training", *EXPERIMENTS])
def test_panes_on_phones_in_the_dark(runs_server: Running, open_page: Callable[..., Any], pane: str) -> None:
    path = "/lab#p=training&with=second" if pane == "training" else f"/lab#p=experiments&e={pane}"
    page = open_page(runs_server, path, **PHONE)
    page.locator(READY[pane]).first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    names = page.locator(".rail button").all_inner_texts()
    assert [name.strip() for name in names][-2:] == ["Training", "Experiments"]
    for part in (page.evaluate("getComputedStyle(document.body).backgroundColor"),):
        assert all(int(number) < 60 for number in part.removeprefix("rgb(").removesuffix(")").split(","))
    page.locator(".rail button").first.click()
    page.locator(".total b").first.wait_for()
    page.go_back()
    page.locator(READY[pane]).first.wait_for()


def test_hostile_and_damaged_runs_are_shown_as_text(
    serve_model: Serve, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    name = "<img src=x onerror=alert(1)>"
    (tmp_path / name).mkdir()
    lines = [json.dumps({"step": i, "tokens": i, "seconds": i, "loss": 3.0, "bits_per_byte": 1.0}) for i in range(9000)]
    lines[6] = '{"step": 6, "loss": NaN, "bits_per_byte": NaN}'
    lines[7] = "{damaged"
    (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 90', encoding="utf-8")
    (tmp_path / name / "samples.md").write_text("## Step 5 (<b>x</b>)\n\n> <script>alert(2)</script>\n")
    with serve_model(runs_folder=tmp_path, poll_s=0.05) as running:
        page = open_page(running, "/lab#p=training&y=bits")
        page.get_by_role("heading", name=name).wait_for()
        page.get_by_text("one line of metrics.jsonl cannot be read and is left out; the first is line 8").wait_for()
        page.get_by_text("has very many points; every 4th is drawn").wait_for()
        assert page.locator("blockquote").inner_text() == "<script>alert(2)</script>"
        assert page.locator("main img, main script").count() == 0
        assert page.locator("output[for=at]").inner_text().startswith("step 8999")


def test_many_runs_can_be_searched(serve_model: Serve, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    for i in range(130):
        (tmp_path / f"run-{i}").mkdir()
        (tmp_path / f"run-{i}" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens": 8}\n')
        os.utime(tmp_path / f"run-{i}" / "metrics.jsonl", (1e9 + i, 1e9 + i))
    with serve_model(runs_folder=tmp_path, poll_s=0.05) as running:
        page = open_page(running, "/lab#p=training")
        page.get_by_text("the newest 100 of 130").wait_for()
        page.get_by_label("Find by name").fill("run-17")
        page.get_by_text("1 run", exact=True).wait_for()
        page.get_by_role("button", name="run-17").click()
        page.get_by_role("heading", name="run-17", exact=True).wait_for()
        page.get_by_label("Find by name").fill("nothing like it")
        page.get_by_text("No run has this in its name.").wait_for()


def test_runs_of_a_locked_server_and_of_one_that_comes_back(
    serve_model: Serve, trained_run: Path, open_page: Callable[..., Any]
) -> None:
    settings: dict[str, Any] = {"runs_folder": trained_run.parent, "poll_s": 0.05, "keys": (KEY,)}
    with serve_model(**settings) as running:
        page = open_page(running, "/lab#p=training", allow="Failed to load resource")
        port = running.port
        page.get_by_label("needs its key").fill(KEY)
        page.get_by_role("button", name="Open").click()
        page.get_by_text("finished").first.wait_for()
        wait_until(lambda: n_points(page) > 0)
    page.get_by_text("connecting").wait_for()
    with serve_model(port=port, **settings):
        page.get_by_text("connecting").wait_for(state="detached")
        assert n_points(page) > 0
        page.goto("about:blank")


def test_without_runs_and_models_it_is_said_what_to_do(serve_model: Serve, open_page: Callable[..., Any]) -> None:
    with serve_model() as running:
        page = open_page(running, "/lab#p=training")
        page.get_by_text("without a folder of runs").wait_for()
        page.get_by_text("tinystories train --config nano").wait_for()
        page.get_by_role("button", name="Experiments").click()
        page.get_by_text("Two models", exact=True).click()
        page.get_by_text("There is no second model").wait_for()


def test_two_texts(runs_server: Running, model_folder: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, "/lab#p=experiments")
    page.get_by_role("button", name="a boy / a girl").click()
    first, second = (page.get_by_label(label).input_value() for label in ("Your text", "The other text (B)"))
    assert (first.replace("boy", "girl"), "boy" in first) == (second, True)
    storyteller = tinystories.load(model_folder, engine="cpu", precision="fp32", threads=1)
    probs = [storyteller.next_token(text).model_probs for text in (first, second)]
    best = max((max(float(p) for p in pair), i) for i, pair in enumerate(zip(*probs, strict=True)))[1]
    rows = page.locator(".duel li")
    wait_until(lambda: rows.count() and rows.first.locator(".a").inner_text() == percent(probs[0][best]))
    assert rows.first.locator(".b").inner_text() == percent(probs[1][best])
    difference = rows.first.locator(".difference").inner_text()
    assert float(difference.replace("−", "-")) == pytest.approx(100 * (probs[1][best] - probs[0][best]), abs=0.051)
    page.get_by_label("The other text (B)").fill(first)
    page.get_by_text("The two guesses overlap by 100 %").wait_for()
    expect_state(page, t2=first)
    page.reload()
    page.get_by_text("The two guesses overlap by 100 %").wait_for()


def test_two_models(runs_server: Running, model_folder: Path, trained_run: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, f"/lab#p=experiments&e=models&t={quote(TEXT)}")
    page.get_by_label("The other model (B)").select_option("run second")
    expect_state(page, m2="run second")
    page.get_by_label("Checkpoint", exact=True).select_option("4")
    folder = trained_run / "checkpoints" / "step-0000004"
    traces = [
        tinystories.load(path, engine="cpu", precision="fp32", threads=1).trace(TEXT) for path in (model_folder, folder)
    ]
    page.get_by_role("heading", name="B: second, step 4").wait_for()
    cells = page.locator(".facts-table tbody tr")
    for row, trace in enumerate(traces):
        assert float(cells.nth(row).locator("td").nth(1).inner_text()) == pytest.approx(trace.bits_per_byte, abs=0.002)
    page.locator("[data-index='3']").last.hover()
    numbers = f"A {traces[0].surprise_bits[3]:.2f} bits, B {traces[1].surprise_bits[3]:.2f} bits"
    page.get_by_text(numbers).wait_for()
    page.locator(".duel li").first.wait_for()
    side = "A" if traces[0].bits_per_byte < traces[1].bits_per_byte else "B"
    page.get_by_text(f"{side} is less surprised by this text").wait_for()
    page.reload()
    page.get_by_role("heading", name="B: second, step 4").wait_for()


def test_the_quiz_by_mouse_keeps_both_scores(runs_server: Running, open_page: Callable[..., Any]) -> None:
    items = build_quiz()
    page = open_page(runs_server, "/lab#p=experiments&e=quiz")
    page.get_by_text(f"Question 1 of {len(items)}").wait_for()
    assert "The model is" not in page.locator(".quiz").inner_text()
    expected = []
    for number, pick in enumerate(("answer", "distractor", "answer")):
        _, truth, _ = runs_server.client.request("POST", "/lab/api/quiz", {"item": number})
        page.get_by_text(f"Question {number + 1} of").wait_for()
        page.locator(f"[data-word='{truth[pick]}']").click()
        said = "You are right." if pick == "answer" else f"The story says “{truth['answer']}”."
        page.get_by_text(said).wait_for()
        page.get_by_text("The model is right:" if truth["is_model_right"] else "The model is wrong here:").wait_for()
        assert page.locator(".gap").inner_text() == truth["answer"]
        expected.append((pick == "answer") + 2 * truth["is_model_right"])
        page.get_by_role("button", name="Next (N)").click()
    n_model = sum(digit > 1 for digit in expected)
    page.get_by_text(f"You: 2 of 3 · Model: {n_model} of 3").wait_for()
    expect_state(page, quiz="".join(map(str, expected)), qi=None)
    page.reload()
    page.get_by_text("Question 4 of").wait_for()
    page.get_by_text(f"You: 2 of 3 · Model: {n_model} of 3").wait_for()
    page.go_back()
    page.get_by_text("You are right.").wait_for()  # the third question, answered
    page.get_by_role("button", name="Start again").click()
    page.get_by_text("Question 1 of").wait_for()


def test_experiments_by_keyboard_alone(runs_server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, "/lab")
    page.locator(".token").first.wait_for()
    focus_by_tab(page, "e.innerText?.startsWith('Experiments')")
    page.keyboard.press("Enter")
    page.locator(".duel").wait_for()
    focus_by_tab(page, "e.matches('.chip')")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "second"
    page.keyboard.press("Control+A")
    page.keyboard.type("A dog")
    page.keyboard.press("Escape")
    expect_state(page, t2="A dog")
    for name in list(EXPERIMENTS)[1:]:
        focus_by_tab(page, "e.name === 'experiment' && e.checked")
        page.keyboard.press("ArrowRight")
        expect_state(page, e=name)
        if name == "models":
            focus_by_tab(page, "e.id === 'second-model'")
            page.keyboard.press("ArrowDown")
            expect_state(page, m2="run first")
            page.get_by_role("heading", name="B: first").wait_for()
        elif name == "quiz":
            page.locator(".answers button:enabled").first.wait_for()
            page.keyboard.press("2")
            page.get_by_role("button", name="Next (N)").wait_for()
            page.keyboard.press("n")
            page.get_by_text("Question 2 of").wait_for()
            focus_by_tab(page, "e.matches('.answers button')")
            page.keyboard.press("Enter")
            page.get_by_text("You: ").wait_for()
            wait_until(lambda: len(state_of(page).get("quiz", "")) == 2)
    page.locator(".piece").first.wait_for()


def test_tokenizers(runs_server: Running, model_folder: Path, open_page: Callable[..., Any]) -> None:
    text = "The naïve cat 🐈."
    page = open_page(runs_server, f"/lab#p=experiments&e=tokens&t={quote(text)}")
    tokenizer = tinystories.load(model_folder, engine="cpu", precision="fp32", threads=1).tokenizer
    n_tokens = len(tokenizer.encode(text))
    page.get_by_text(f"{n_tokens} tokens", exact=True).first.wait_for()
    assert page.get_by_label("The tokens of small").locator("[role=listitem]").count() == n_tokens
    assert page.locator(".piece.bytes").count() > 0
    page.get_by_label("Your text").fill("A")
    page.get_by_text("1 tokens", exact=True).first.wait_for()


def test_screen_readers_get_names_and_tables(runs_server: Running, open_page: Callable[..., Any]) -> None:
    page = open_page(runs_server, "/lab#p=training")
    page.locator(".plot canvas").first.wait_for()
    wait_for_script(page, "document.querySelector('.plot').ariaLabel.includes('points up to step 12')")
    for name, ready in READY.items():
        path = "#p=training&with=second" if name == "training" else f"#p=experiments&e={name}"
        page.goto(f"http://127.0.0.1:{runs_server.port}/lab{path}")
        page.locator(ready).first.wait_for()
        unnamed = page.evaluate(
            """[...document.querySelectorAll('button, input, select, textarea')].filter((e) =>
                !(e.ariaLabel || e.innerText?.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
        )
        assert unnamed == []
