"""The figures of Training and Experiments: saved in every form, and made again by the Python that they copy."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pytest
from figure_helpers import SVG, save_figure, saved
from serve_helpers import Running, Serve

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.serve.lab.quiz import build_quiz
from tinystories.serve.lab.runs import parse_samples

pytestmark = pytest.mark.browser

TEXT = 'The cat said: "A dog sat on the mat."'
OTHER_TEXT = 'The cat said: "A cat sat on the mat."'
CLIPBOARD = ["clipboard-read", "clipboard-write"]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(model_folder: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the Python of the figures runs: the served model, another one, and runs, under the names shown."""
    root = tmp_path_factory.mktemp("figures")
    shutil.copytree(model_folder, root / "model")
    for name in ("first", "second"):
        shutil.copytree(trained_run, root / "runs" / name)
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    (root / "runs" / "second" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:-3]))
    shutil.copytree(trained_run, root / "other")
    return root


@pytest.fixture(scope="module")
def server(serve_model: Serve, folder: Path) -> Iterator[Running]:
    paths = {"folder": folder / "model", "runs_folder": folder / "runs", "compare_model": folder / "other"}
    with serve_model(precision="fp32", poll_s=0.05, **paths) as running:
        yield running


@pytest.fixture
def open_figure(
    server: Running, folder: Path, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Open a state of the lab; the Python of its figures runs in `folder`."""
    monkeypatch.chdir(folder)
    pages = []

    def start(state: str, text: str = TEXT) -> Any:
        page = open_page(server, f"/lab#{state}&t={quote_plus(text)}", permissions=CLIPBOARD)
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.goto("about:blank")  # Training would go on asking


def test_curves(open_figure: Callable[..., Any], tmp_path: Path) -> None:
    page = open_figure("p=training&run=first&with=second&y=bits&x=tokens")
    numbers, rows, python = save_figure(page, "curves", tmp_path)
    assert [run["run"] for run in numbers] == ["first", "second"]
    for run, (path, records) in zip(numbers, python["runs"].items(), strict=True):
        assert path == f"runs/{run['run']}"
        train = [record for record in records if "loss" in record]
        evaluations = [record for record in records if record.get("evaluated") and not record.get("final")]
        for shown, record in zip([*run["training"], *run["evaluations"]], [*train, *evaluations], strict=True):
            assert {name: shown[name] for name in shown.keys() & record.keys()}.items() <= record.items()
    header, *lines = rows
    for run in numbers:
        points = sorted([*run["training"], *run["evaluations"]], key=lambda point: point["step"])
        mine = [dict(zip(header, line, strict=True)) for line in lines if line[0] == run["run"]]
        assert [int(line["step"]) for line in mine] == [point["step"] for point in points]
        for line, point in zip(mine, points, strict=True):
            for name in ("loss", "val_bits_per_byte", "learning_rate"):
                assert (float(line[name]) if line[name] else None) == point.get(name)
    with saved(page, page.locator("[data-figure='curves']"), "SVG", tmp_path) as path:
        root = ElementTree.parse(path).getroot()
    texts = [one.text or "" for one in root.findall(f".//{SVG}text")]
    assert {"first: on training text", "second: on training text", "bits per byte", "tokens"} <= set(texts)
    n_lines = sum(one.attrib.get("stroke-linejoin") == "round" for one in root.iter(f"{SVG}path"))
    assert n_lines == 2 * 2 + 2 + 2  # training and validation, learning rate, gradient norm: each of two runs
    n_dots = len(root.findall(f".//{SVG}circle"))
    assert n_dots == sum(len(run["evaluations"]) for run in numbers)


def test_samples(open_figure: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    page = open_figure("p=training&run=first&s=8")
    numbers, rows, python = save_figure(page, "samples", tmp_path, n_texts=3)
    (section,) = [one for one in parse_samples(folder / "runs" / "first" / "samples.md")[0] if one["step"] == 8]
    assert numbers == {"run": "first", **section}
    assert [row[2] for row in rows[1:]] == python["stories"] == section["stories"]


def test_a_text_at_checkpoints(open_figure: Callable[..., Any], tmp_path: Path) -> None:
    page = open_figure("p=training&run=first&ck=4")
    page.locator(".reading[data-step='4']").wait_for()
    numbers, _, python = save_figure(page, "reading", tmp_path)
    trace = python["traces"][4]
    assert (numbers["run"], numbers["step"], numbers["text"]) == ("first", 4, TEXT)
    assert numbers["bits_per_byte"] == pytest.approx(trace.bits_per_byte, abs=1e-3)
    assert [row["id"] for row in numbers["tokens"]] == trace.ids.tolist()
    bits = [row["surprise_bits"] for row in numbers["tokens"][1:]]
    np.testing.assert_allclose(bits, trace.surprise_bits[1:], atol=1e-3)
    candidates = python["storyteller"].next_token(trace).candidates(5)[:5]  # and END
    assert [row["id"] for row in numbers["next"]] == [candidate.id for candidate in candidates]
    probs = [row["probability"] for row in numbers["next"]]
    np.testing.assert_allclose(probs, [candidate.model_prob for candidate in candidates], atol=1e-5)
    page.get_by_label("Checkpoint", exact=True).fill("2")
    page.locator(".reading[data-step='12']").wait_for()
    page.get_by_text("The checkpoints looked at so far").click()
    numbers, rows, python = save_figure(page, "checkpoints", tmp_path, has_picture=False)
    assert [row["step"] for row in numbers] == list(python["traces"]) == [4, 12]
    for row, line in zip(numbers, rows[1:], strict=True):
        assert row["bits_per_byte"] == pytest.approx(python["traces"][row["step"]].bits_per_byte, abs=1e-3)
        assert [row["next"][0]["token"], str(row["next"][0]["probability"])] == line[2:]


def test_two_texts(open_figure: Callable[..., Any], tmp_path: Path) -> None:
    page = open_figure(f"p=experiments&t2={quote_plus(OTHER_TEXT)}")
    numbers, rows, python = save_figure(page, "two-sides", tmp_path)
    assert (numbers["a"]["text"], numbers["b"]["text"]) == (TEXT, OTHER_TEXT)
    for row, line in zip(numbers["next"], rows[1:], strict=True):
        for side in ("a", "b"):
            assert row[side] == pytest.approx(float(python[side][row["id"]]), abs=1e-5)
        assert line[:2] == [str(row["id"]), row["label"]]
    assert numbers["overlap"] == pytest.approx(float(python["overlap"]), abs=1e-3)


@pytest.mark.parametrize("chosen", ["m2=run+second&m2s=4", "m2=run+second", "m2=compare"])
def test_two_models(open_figure: Callable[..., Any], tmp_path: Path, chosen: str) -> None:
    page = open_figure(f"p=experiments&e=models&{chosen}")
    numbers, rows, python = save_figure(page, "two-models", tmp_path)
    traces = python["traces"]
    assert len(rows) == 1 + sum(len(trace.ids) for trace in traces)
    for side, trace in zip(("a", "b"), traces, strict=True):
        assert numbers[side]["bits_per_byte"] == pytest.approx(trace.bits_per_byte, abs=1e-3)
        bits = [row["surprise_bits"] for row in numbers[side]["tokens"][1:]]
        np.testing.assert_allclose(bits, trace.surprise_bits[1:], atol=1e-3)
    numbers, _, python = save_figure(page, "two-sides", tmp_path)
    for row in numbers["next"]:
        assert row["a"] == pytest.approx(float(python["a"][row["id"]]), abs=1e-5)
        assert row["b"] == pytest.approx(float(python["b"][row["id"]]), abs=1e-5)


def test_two_models_with_other_tokens(
    serve_model: Serve, folder: Path, open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (folder / "bundled").exists():
        shutil.copytree(BUNDLED_MODEL, folder / "bundled")  # has int8 weights only
    monkeypatch.chdir(folder)
    with serve_model(precision="fp32", folder=folder / "model", compare_model=folder / "bundled") as running:
        page = open_page(running, f"/lab#p=experiments&e=models&m2=compare&t={quote_plus(TEXT)}", permissions=CLIPBOARD)
        numbers, rows, python = save_figure(page, "next-of-each", tmp_path, has_picture=False)
        assert len(rows) == 1 + 2 * 10
        for side, trace in zip(("a", "b"), python["traces"], strict=True):
            candidates = python["storyteller"].next_token(trace).candidates(10)[:10]
            assert [row["id"] for row in numbers[side]["next"]] == [candidate.id for candidate in candidates]
            probs = [row["probability"] for row in numbers[side]["next"]]
            np.testing.assert_allclose(probs, [candidate.model_prob for candidate in candidates], atol=1e-5)
            assert all(f" {candidate.model_prob}\n" in python["printed"] for candidate in candidates)
        page.goto("about:blank")


def test_a_text_beyond_the_context_is_made_again_from_where_it_was_cut(
    open_figure: Callable[..., Any], tmp_path: Path
) -> None:
    page = open_figure("p=training&run=first&ck=8", TEXT * 20)
    page.locator(".reading[data-step='8']").wait_for()
    numbers, _, python = save_figure(page, "reading", tmp_path)
    assert [row["id"] for row in numbers["tokens"]] == python["traces"][8].ids.tolist()


def test_a_question_of_the_quiz(open_figure: Callable[..., Any], tmp_path: Path) -> None:
    page = open_figure("p=experiments&e=quiz")
    answer = build_quiz()[0][1].answer
    page.locator(f"[data-word='{answer}']:enabled").click()
    numbers, rows, python = save_figure(page, "question-1", tmp_path, has_picture=False)
    assert (numbers["question"], numbers["is_reader_right"], numbers["answer"]) == (1, True, answer)
    assert [numbers["prob"], numbers["prob_alone"]] == pytest.approx(python["probs"], abs=1e-3)
    assert rows[1] == ["1", "true", json.dumps(numbers["is_model_right"])]


@pytest.mark.parametrize("place", [1, 2])
def test_pieces_of_a_tokenizer(open_figure: Callable[..., Any], tmp_path: Path, place: int) -> None:
    page = open_figure("p=experiments&e=tokens&m2=compare", "The naïve cat 🐈 sat.")
    numbers, _, python = save_figure(page, f"tokens-{place}", tmp_path)
    assert [piece["id"] for piece in numbers["tokens"]] == python["ids"]
    assert numbers["n_tokens"] == len(python["ids"])
