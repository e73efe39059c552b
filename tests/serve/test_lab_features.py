"""The lab in Debian's chromium: sliders, paths, endings, the tour, figures and their Python, a page from disk."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_helpers import run_python, save_figure, saved
from serve_helpers import Running, Serve, Watch, wait_for_script

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL, read_model
from tinystories.config import SamplingConfig
from tinystories.generate.next_token import STEPS, analyze_next_token
from tinystories.generate.sampling import apply_repetition_penalty, compute_weights, sample_unchecked
from tinystories.serve.lab.recording import record
from tinystories.serve.lab.single_file import build_page
from tinystories.serve.model import ServedModel

pytestmark = pytest.mark.browser

TEXT = 'Lily had a red ball. She said: "Give me the'
HASH = "t=Lily+had+a+red+ball.+She+said%3A+%22Give+me+the"
Open = Callable[..., Any]


def texts_of(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def wait_for_bars(page: Any, text: str) -> Any:
    """Wait for the bars of the token after a text, and return them."""
    bars = page.locator(f"[data-text={json.dumps(text)}] button.bar")
    bars.first.wait_for()
    return bars


# ---- Sampling in the page


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3},
        {"temperature": 2.0, "min_p": 0.02},
        {"top_k": 7},
        {"top_p": 0.6, "temperature": 1.3},
        {"min_p": 0.1, "top_k": 40, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_the_page_samples_as_python_does(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Open, settings: dict[str, float]
) -> None:
    generator = np.random.default_rng(len(str(settings)))
    config = SamplingConfig(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings))  # type: ignore[arg-type]
    logits = generator.normal(size=300, scale=3).astype(np.float32)
    logits[10:20] = logits[5]  # ties
    seen = np.zeros(300, dtype=np.bool_)
    seen[[5, 7, 11, 200]] = True
    expected = analyze_next_token(logits, config, storyteller.tokenizer, seen)
    us = generator.random(50, dtype=np.float32)
    page = open_page(lab_server, "/lab")
    values = {name: getattr(config, name) for name in STEPS}
    answer = page.evaluate(
        """async ([logits, seen, settings, us]) => {
            const sampling = await import('/page/sampling.js');
            const flags = Uint8Array.from(logits, (_, id) => seen.includes(id));
            const step = sampling.analyze(Float32Array.from(logits), settings, flags);
            const after = Object.fromEntries(Object.entries(step.after).map(([name, probs]) => [name, [...probs]]));
            return { model: [...step.model], after, cut: logits.map((_, id) => sampling.cutBy(step, id)),
                weights: [...step.weights], drawn: us.map((u) => sampling.draw(step, u)),
                entropy: sampling.entropyBits(step.model) };
        }""",
        [logits.tolist(), np.flatnonzero(seen).tolist(), values, us.tolist()],
    )
    np.testing.assert_allclose(answer["model"], expected.model_probs, atol=1e-6)
    for name in STEPS:
        np.testing.assert_allclose(answer["after"][name], expected.after[name], rtol=2e-6, err_msg=name)
    penalized = apply_repetition_penalty(logits[None], config.repetition_penalty, seen[None])
    weights = compute_weights(penalized, config)
    assert answer["weights"] == weights[0].tolist()  # bit for bit
    assert answer["cut"] == [expected.cut_by(token) for token in range(300)]
    assert answer["entropy"] == pytest.approx(expected.entropy_bits, abs=1e-4)
    rows, seen_rows = np.repeat(logits[None], 50, axis=0), np.repeat(seen[None], 50, axis=0)
    assert [one["id"] for one in answer["drawn"]] == sample_unchecked(rows, config, us, seen_rows)
    for u, one in zip(us.tolist(), answer["drawn"], strict=True):
        assert one["below"] <= u < one["below"] + answer["after"]["min_p"][one["id"]]


def test_sliders_ask_the_server_nothing(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Open
) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}")
    wait_for_bars(page, TEXT)
    asked: list[str] = []
    page.on("request", lambda request: "/lab/api" in request.url and asked.append(request.url))
    page.get_by_role("slider", name="Top-p").fill("1")
    page.get_by_role("slider", name="Min-p").fill("0")
    page.get_by_role("slider", name="Temperature").fill("1.5")
    step = storyteller.next_token(storyteller.trace(TEXT), temperature=1.5, top_p=1.0, min_p=0.0)
    best = step.candidates(1)[0]
    shown = f"{100 * best.final_prob:.1f} %"
    page.locator(f"[data-id='{best.id}'] .number").filter(has_text=f"→ {shown}").wait_for()
    page.get_by_text(f"{step.n_kept} of 4096 tokens may be drawn").wait_for()
    page.get_by_text(f"uncertainty: {step.entropy_bits:.2f} bits").wait_for()
    assert asked == []


# ---- Paths and endings


def test_the_tree_remembers_three_paths(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}")
    wait_for_bars(page, TEXT)
    labels = [label.replace("·", " ") for label in texts_of(page, "button.bar .label")]
    for i in range(3):
        page.keyboard.press(str(i + 1))
        wait_for_bars(page, TEXT + labels[i])
        page.keyboard.press("r")
        wait_for_bars(page, TEXT)
    assert page.locator(".tree button").count() == 3
    page.keyboard.press("2")
    wait_for_bars(page, TEXT + labels[1])
    page.keyboard.press("1")
    page.locator(".tree button").nth(3).wait_for()
    wait_for_script(page, "document.querySelectorAll('.tree [aria-current]').length === 1")
    page.keyboard.press("r")
    wait_for_bars(page, TEXT + labels[1])
    page.keyboard.press("r")
    wait_for_bars(page, TEXT)
    page.keyboard.press("4")  # a fourth path: the oldest, which is the first, is forgotten
    wait_for_bars(page, TEXT + labels[3])
    firsts = page.locator(".tree button").evaluate_all(
        "all => all.map((one) => one.dataset.path).filter((p) => !p.includes(','))"
    )
    ids = page.evaluate("location.hash.match(/a=([0-9]+)/)[1]")
    assert len(firsts) == 3
    assert ids in firsts
    page.locator(".tree button").filter(has_not_text="%%").nth(1).focus()
    page.keyboard.press("Enter")
    wait_for_script(page, "ids => !location.hash.includes(`a=${ids}&`) && !location.hash.endsWith(`a=${ids}`)", arg=ids)
    page.get_by_role("button", name="Words").click()
    page.get_by_role("button", name="Next word").click()
    assert page.locator(".tree button").count() >= 4  # they outlive a look at another pane


def test_a_long_path_shows_its_last_twelve_tokens(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}&temp=0")
    text = TEXT
    for n in range(14):
        label = wait_for_bars(page, text).first.locator(".label").inner_text()
        page.keyboard.press("1")
        text += label.replace("·", " ").replace("↵", "\n")
        wait_for_script(
            page,
            "n => (decodeURIComponent(location.hash).match(/a=([0-9,]+)/)?.[1].split(',').length) === n",
            arg=n + 1,
        )
        wait_for_script(page, "text => document.getElementById('text').value === text", arg=text)
    assert page.locator(".tree button").count() == 12
    assert page.locator(".tree button[aria-current]").count() == 1


def test_space_shows_where_the_number_fell(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}&seed=3")
    wait_for_bars(page, TEXT)
    page.keyboard.press(" ")
    page.get_by_text("of the line from 0 to 1").wait_for()
    places = page.evaluate(
        """() => ['.line b', '.line .drawn', '.line'].map((selector) => {
            const box = document.querySelector(selector).getBoundingClientRect();
            return [box.left, box.right];
        })"""
    )
    (mark, _), (left, right), line = places
    assert left - 1.5 <= mark <= right
    assert line[0] - 1 <= left <= right <= line[1] + 1
    assert page.locator(".line i").count() >= 2


def test_another_draw_at_the_same_place_is_another_number(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}")
    numbers = set()
    for _ in range(4):
        wait_for_bars(page, TEXT)
        page.keyboard.press(" ")
        numbers.add(page.get_by_text("of the line from 0 to 1").inner_text().partition(" fell")[0])
        wait_for_script(page, "text => !['', text].includes(document.querySelector('.bars').dataset.text)", arg=TEXT)
        page.keyboard.press("r")
    assert len(numbers) == 4


def test_eight_endings_are_those_of_python(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Open
) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}&temp=0.5&seed=5")
    page.get_by_role("button", name="Tell 8 endings from here").click()
    page.get_by_role("button", name="Tell 8 endings from here").wait_for(timeout=120_000)
    page.locator(".endings details").nth(7).wait_for()
    shown = page.locator(".endings details").evaluate_all("all => all.map((one) => one.lastChild.textContent)")
    stories = storyteller.generate(TEXT, num=8, seed=5, temperature=0.5, max_tokens=400)
    assert shown == [story.continuation for story in stories]
    firsts = page.get_by_text("First words:").inner_text()
    first = stories[0].continuation.split()[0]
    n = sum(story.continuation.split()[0] == first for story in stories)
    assert f"{first} {n}×" in firsts


# ---- Figures


def compare_words(data: Any, python: dict[str, Any]) -> None:
    np.testing.assert_allclose([row["surprise_bits"] for row in data[1:]], python["trace"].surprise_bits[1:], atol=1e-4)
    assert [row["rank"] for row in data] == python["trace"].ranks.tolist()


def compare_next(data: Any, python: dict[str, Any]) -> None:
    for row, candidate in zip(data["candidates"], python["step"].candidates(12), strict=False):
        assert (row["id"], row["cut"]) == (candidate.id, candidate.cut_by)
        assert row["model"] == pytest.approx(candidate.model_prob, abs=1e-5)
        assert row["final"] == pytest.approx(candidate.final_prob, abs=1e-5)
    assert data["n_kept"] == python["step"].n_kept


def compare_paths(data: Any, python: dict[str, Any]) -> None:
    shown = [node["probability"] for node in data["nodes"]]
    printed = [float(part) for part in python["printed"].replace("[", " ").replace("]", " ").split()]
    np.testing.assert_allclose(shown, printed, atol=1e-4)


def compare_reading(data: Any, python: dict[str, Any]) -> None:
    np.testing.assert_allclose(data["attention"], python["attention"][data["token"]], atol=1e-9)


def compare_heads(data: Any, python: dict[str, Any]) -> None:
    for row in data:
        for name, array in (
            ("first", "to_first"),
            ("self", "to_itself"),
            ("previous", "to_previous"),
            ("same", "to_same"),
        ):
            assert row[name] == pytest.approx(python[array][row["layer"], row["head"]], abs=1e-4)


def compare_matrix(data: Any, python: dict[str, Any]) -> None:
    for row, expected in zip(data["attention"], python["attention"], strict=True):
        np.testing.assert_allclose(row, expected[: len(row)], atol=1e-9)


def compare_off(data: Any, python: dict[str, Any]) -> None:
    assert data["mean_bits"] == pytest.approx(python["trace"].mean_bits, abs=1e-4)
    assert data["ablated_mean_bits"] == pytest.approx(python["ablated"].mean_bits, abs=1e-4)


def compare_lens(data: Any, python: dict[str, Any]) -> None:
    ids = [[[token for token, _ in cell] for cell in row] for row in data["top"]]
    assert ids == python["lens"].top_ids.tolist()
    assert data["final_ranks"] == python["lens"].final_ranks.tolist()


def compare_ranks(data: Any, python: dict[str, Any]) -> None:
    assert data["ranks"] == python["lens"].final_ranks[:, -1].tolist()


FIGURES: list[tuple[str, str, str, Callable[[Any, dict[str, Any]], None]]] = [
    ("words", "words", "", compare_words),
    ("next", "next-word", "&temp=0.7&tp=0.9", compare_next),
    ("next", "paths", "", compare_paths),
    ("attention", "attention-of-word-5", "&l=2&h=3&q=5", compare_reading),
    ("attention", "all-heads", "", compare_heads),
    ("attention", "heads-off", "&off=2.3_0.1", compare_off),
    ("attention", "attention-2-3", "&l=2&h=3", compare_matrix),
    ("inside", "logit-lens", "", compare_lens),
    ("inside", "rank-by-layer", "", compare_ranks),
]


@pytest.mark.parametrize(("pane", "name", "state", "compare"), FIGURES, ids=[figure[1] for figure in FIGURES])
def test_every_figure_can_be_saved_and_made_by_python(
    lab_server: Running,
    open_page: Open,
    tmp_path: Path,
    pane: str,
    name: str,
    state: str,
    compare: Callable[[Any, dict[str, Any]], None],
) -> None:
    page = open_page(lab_server, f"/lab#p={pane}&{HASH}{state}", permissions=["clipboard-read", "clipboard-write"])
    if name == "paths":  # the probabilities of a path are known from choosing it
        text = TEXT
        for _ in range(2):
            text += wait_for_bars(page, text).first.locator(".label").inner_text().replace("·", " ")
            page.keyboard.press("1")
        wait_for_bars(page, text)
    numbers, _, variables = save_figure(page, name, tmp_path, has_picture=name != "heads-off")
    compare(numbers, variables)


def test_endings_begin_when_the_drawn_token_is_known(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}")
    wait_for_bars(page, TEXT)
    tell = page.get_by_role("button", name="Tell 8 endings from here")
    held: list[Any] = []
    is_open = threading.Event()
    page.route("**/lab/api/tokens", lambda route: route.continue_() if is_open.is_set() else held.append(route))
    page.keyboard.press(" ")
    page.get_by_text("of the line from 0 to 1").wait_for()
    assert tell.is_disabled()  # endings from the old text would be thrown away with it
    is_open.set()
    for route in held:
        route.continue_()
    tell.click()  # waits until it is enabled
    page.locator(".endings details").nth(7).wait_for(timeout=120_000)


def test_python_of_endings_tells_them(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=next&{HASH}", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Tell 8 endings from here").click()
    page.locator(".endings details").nth(7).wait_for(timeout=120_000)
    tools = page.locator("[data-figure='endings']")
    tools.get_by_role("button", name="Copy as Python").click()
    tools.get_by_text("Copied.").wait_for()
    stories = run_python(page.evaluate("navigator.clipboard.readText()"))["stories"]
    shown = page.locator(".endings details").evaluate_all("all => all.map((one) => one.lastChild.textContent)")
    assert shown == [story.continuation for story in stories]


# ---- The tour


def test_the_tour_by_keyboard(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, "/lab", first_visit=True)
    tour = page.get_by_role("region", name="Tour of the lab")
    panes = ["words", "words", "next", "next", "attention", "attention", "inside"]
    for number, pane in enumerate(panes, 1):
        tour.get_by_role("heading", name=f"Question {number} of 7").wait_for()
        guesses = tour.locator(".guesses button")
        guesses.first.wait_for()
        assert guesses.count() >= 3
        wait_for_script(page, "pane => location.hash.includes(`p=${pane}`)", arg=pane)
        if number != 4:  # there the bars are what the question is about
            assert page.locator("section.pane").count() == 0, "the pane would give the answer away"
        assert tour.get_by_role("status").count() == 0
        while not page.evaluate("document.activeElement.matches('.guesses button')"):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        tour.get_by_role("status").filter(has_text="Right.").or_(
            tour.get_by_role("status").filter(has_text="Not this time.")
        ).wait_for()
        page.locator("section.pane").wait_for()
        assert tour.locator(".answer").count() == 1
        onward = "Finish" if number == 7 else "Next question"
        wait_for_script(page, "name => document.activeElement.innerText === name", arg=onward)
        page.keyboard.press("Enter")
    tour.wait_for(state="detached")
    page.goto("about:blank")
    page.go_back()
    page.locator("section.pane").wait_for()
    assert tour.count() == 0, "once is enough"


def test_the_tour_can_be_skipped_and_started_again(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, "/lab", first_visit=True)
    tour = page.get_by_role("region", name="Tour of the lab")
    tour.locator(".guesses button").first.wait_for()
    page.get_by_role("button", name="Next word").click()
    page.locator(".bars button").first.wait_for()  # only the pane that is asked about is hidden
    page.keyboard.press("Escape")
    tour.wait_for(state="detached")
    page.get_by_role("button", name="Words").click()
    page.locator(".total b").first.wait_for()
    page.get_by_label("Your text").fill("A dog")
    page.get_by_role("button", name="Tour").click()
    tour.locator(".guesses button").first.wait_for()
    assert len(page.get_by_label("Your text").input_value()) > 20  # too short a text is replaced by the example
    tour.get_by_role("button", name="Skip the tour").click()
    tour.wait_for(state="detached")


def test_a_link_is_not_interrupted_by_the_tour(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=inside&{HASH}", first_visit=True)
    page.locator(".lens td").first.wait_for()
    assert page.get_by_role("region", name="Tour of the lab").count() == 0


def test_answers_of_the_tour_are_those_of_python(
    lab_server: Running, storyteller: tinystories.Storyteller, open_page: Open
) -> None:
    page = open_page(lab_server, f"/lab#{HASH}")
    page.get_by_role("button", name="Tour").click()
    tour = page.get_by_role("region", name="Tour of the lab")
    trace = storyteller.trace(TEXT)
    worst = int(np.nanargmax(trace.surprise_bits))
    attention = trace.attention
    previous = np.array([[np.diag(head, -1)[1:].mean() for head in layer] for layer in attention])
    layer, head = np.unravel_index(previous.argmax(), previous.shape)
    cost = trace.ablate([(int(layer), int(head))]).mean_bits - trace.mean_bits
    lens = trace.logit_lens(positions=[len(trace.ids) - 1])
    first = int(np.flatnonzero(lens.final_ranks[:, 0] == 1)[0])
    expected = [
        str(len(trace.ids)),
        trace.labels[worst],
        storyteller.next_token(trace).candidates(1)[0].text.replace(" ", "·"),
        "it grows",
        "the token before",
        "harder" if cost > 0.01 else "easier" if cost < -0.01 else "the same",
        "embedding" if first == 0 else f"layer {first - 1}",
    ]
    for number, answer in enumerate(expected, 1):
        tour.get_by_role("heading", name=f"Question {number} of 7").wait_for()
        tour.locator(".guesses button").first.wait_for()
        tour.locator(".guesses button").nth(0).click()
        assert tour.locator(".answer").inner_text() == answer
        tour.locator("button.primary").click()


# ---- A page from disk


@pytest.fixture(scope="module")
def recorded_page(storyteller: tinystories.Storyteller, tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = ServedModel.describe(read_model(BUNDLED_MODEL), name="tinystories", engine_name="cpu", precision="int8")
    path = tmp_path_factory.mktemp("recorded") / "page.html"
    path.write_text(build_page(record(storyteller, served, TEXT)), encoding="utf-8")
    return path


@pytest.fixture
def disk_page(browser: Any, recorded_page: Path) -> Iterator[Any]:
    """The page from disk, without a network; afterwards it has asked for nothing, and its console holds no errors."""
    context = browser.new_context(viewport={"width": 1200, "height": 850}, offline=True, accept_downloads=True)
    context.set_default_timeout(60_000)
    page = context.new_page()
    watch, requests = Watch(page), []
    page.on("request", lambda request: requests.append(request.url.partition("#")[0]))
    page.goto(recorded_page.as_uri())
    page.get_by_role("button", name="Skip the tour").click()
    yield page
    assert {url for url in requests if not url.startswith(("blob:", "data:"))} == {recorded_page.as_uri()}
    assert watch.errors == []
    context.close()


def test_all_panes_of_a_page_from_disk(disk_page: Any, storyteller: tinystories.Storyteller, tmp_path: Path) -> None:
    page, trace = disk_page, storyteller.trace(TEXT)
    page.locator(".total b").filter(has_text=f"{trace.bits_per_byte:.3f}").wait_for()
    title = page.locator("[data-index='3']").get_attribute("title")
    assert float(title.split(" bits")[0]) == pytest.approx(trace.surprise_bits[3], abs=0.006)
    assert page.get_by_label("Your text").get_attribute("readonly") is not None
    page.get_by_text("A recording of tinystories").wait_for()

    page.get_by_role("button", name="Next word").click()
    bars = wait_for_bars(page, TEXT)
    page.get_by_role("slider", name="Temperature").fill("1.5")
    step = storyteller.next_token(trace, temperature=1.5)
    best = step.candidates(1)[0]
    page.locator(f"[data-id='{best.id}'] .number").filter(has_text=f"→ {100 * best.final_prob:.1f} %").wait_for()
    label = bars.first.locator(".label").inner_text()
    page.keyboard.press("1")
    wait_for_bars(page, TEXT + label.replace("·", " "))
    page.keyboard.press("r")
    wait_for_bars(page, TEXT)
    page.keyboard.press(" ")
    page.get_by_text("of the line from 0 to 1").wait_for()
    page.keyboard.press("r")
    wait_for_bars(page, TEXT)
    page.get_by_role("button", name="Tell 8 endings from here").click()
    page.get_by_role("alert").filter(has_text="This page is a recording").wait_for()  # of other settings
    page.go_back()
    page.goto(page.url.partition("#")[0] + "#p=next")
    wait_for_bars(page, TEXT)
    page.get_by_role("button", name="Tell 8 endings from here").click()
    page.locator(".endings details").nth(7).wait_for()

    page.get_by_role("button", name="Attention").click()
    page.locator(".thumbs button").nth(20).click()  # layer 3, head 2
    page.get_by_role("heading", name="Layer 3, head 2", exact=True).wait_for()
    last = len(trace.ids) - 1
    byte = trace.attention_bytes(3)[2, last, last - 1]
    wait_for_script(page, "document.querySelectorAll('.chips [title$=\"%\"]').length > 3")
    shown = page.locator(f"[data-index='{last - 1}']").get_attribute("title")
    assert float(shown.removesuffix(" %")) == pytest.approx(100 * (byte / 255) ** 2, abs=0.06)
    page.get_by_role("button", name="Switch off layer 3, head 2").click()
    without = f"{trace.ablate([(3, 2)]).mean_bits:.2f} bits"
    page.locator(".facts dd").nth(1).filter(has_text=without).wait_for()  # before, after, difference

    page.get_by_role("button", name="Inside").click()
    lens = trace.logit_lens(top=1)
    cell = page.locator("[data-cell='4.6']")
    cell.wait_for()
    label = storyteller.trace([int(lens.top_ids[4, 6, 0])]).labels[0]
    assert cell.get_attribute("title").startswith(f"{label} ")
    with saved(page, page.locator("[data-figure='logit-lens']"), "PNG", tmp_path) as path:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_a_page_from_disk_does_not_hold_is_said_in_words(disk_page: Any) -> None:
    page = disk_page
    notice = page.get_by_role("alert").filter(has_text="it would need the model")
    page.locator("[data-index='4']").click()
    page.locator("aside .choices button").nth(3).click()  # cut here and branch: another text
    notice.wait_for()
    page.go_back()
    page.locator(".total b").nth(2).wait_for()
    page.get_by_role("button", name="Attention").click()
    page.get_by_role("button", name="Switch off").click()
    page.locator(".thumbs button").nth(3).click()
    page.get_by_role("button", name="Switch off").click()  # two heads at once
    notice.wait_for()


def test_the_tour_of_a_page_from_disk(browser: Any, recorded_page: Path) -> None:
    context = browser.new_context(offline=True)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto(recorded_page.as_uri())
    for number in range(1, 8):
        page.get_by_role("heading", name=f"Question {number} of 7").wait_for()
        page.locator(".guesses button").first.click()
        page.locator(".tour button.primary").click()
    page.locator(".tour").wait_for(state="detached")
    context.close()


# ---- Large texts and models


@pytest.fixture(scope="module")
def large_server(serve_folder: Serve) -> Iterator[Running]:
    """12 layers of 12 heads with random weights, and a context of 512."""
    with serve_folder(n_layer=12, n_head=12, n_embd=96, n_ff=192, n_ctx=512) as running:
        yield running


@pytest.mark.parametrize("pane", ["words", "next", "attention", "inside"])
def test_12_layers_of_12_heads_and_a_text_beyond_512_tokens(large_server: Running, open_page: Open, pane: str) -> None:
    page = open_page(large_server, f"/lab#p={pane}")
    page.get_by_label("Your text").fill("Lily had a red ball. Tom took it. " * 80)
    page.get_by_text("The model sees the last 512 tokens").wait_for()
    ready = {
        "words": ".token >> nth=511",
        "next": "button.bar",
        "attention": ".thumbs canvas >> nth=143",
        "inside": ".lens tr >> nth=13",
    }
    page.locator(ready[pane]).first.wait_for()
    if pane == "attention":
        page.locator(".thumbs button").nth(143).click()
        page.get_by_role("heading", name="Layer 11, head 11", exact=True).wait_for()
        wait_for_script(page, "document.querySelector('.matrix canvas')?.width > 500")
        page.locator("[data-index='300']").hover()
        page.locator("p[role=status]").filter(has_text="%").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_undo_by_the_back_button_through_all_panes(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=words&{HASH}")
    names = ["Next word", "Attention", "Inside"]
    for name in names:
        page.get_by_role("button", name=name).click()
        page.locator(f"section[aria-label='{name}']").wait_for()
    for name in [*reversed(names[:-1]), "Words"]:
        page.go_back()
        page.locator(f"section[aria-label='{name}']").wait_for()
    assert page.get_by_label("Your text").input_value() == TEXT


def test_print_shows_the_figures_in_light_and_nothing_to_click(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=words&{HASH}", color_scheme="dark")
    page.locator(".total b").nth(2).wait_for()
    dark = page.locator("[data-index='1']").evaluate("chip => getComputedStyle(chip).backgroundColor")
    page.emulate_media(media="print")
    for selector in (".rail", ".top nav", ".tools", "details"):
        assert not page.locator(selector).first.is_visible(), selector
    wait_for_script(
        page,
        "dark => getComputedStyle(document.querySelector('[data-index=\"1\"]')).backgroundColor !== dark",
        arg=dark,
    )
    assert page.locator(".token").first.is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert page.pdf(print_background=False).startswith(b"%PDF")


def test_dark_is_chosen_and_kept(lab_server: Running, open_page: Open) -> None:
    page = open_page(lab_server, f"/lab#p=words&{HASH}")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark
    page.locator(".token").nth(3).wait_for()
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_targets_are_large_enough_for_fingers(lab_server: Running, open_page: Open) -> None:
    for pane in ("words", "next", "attention", "inside"):
        page = open_page(lab_server, f"/lab#p={pane}&{HASH}", viewport={"width": 390, "height": 844}, has_touch=True)
        page.locator("section.pane .tools").first.wait_for()
        small = page.evaluate(
            """() => [...document.querySelectorAll('button, a, input, summary, textarea')].filter((one) => {
                const { height } = one.getBoundingClientRect();
                const least = one.matches('.token, .tools *, .lens *, .tree *, .thumbs *') ? 32 : 44;
                return height > 0 && height < least;
            }).map((one) => one.outerHTML.slice(0, 120))"""
        )
        assert small == [], pane
