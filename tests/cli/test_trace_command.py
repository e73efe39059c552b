"""`tinystories trace`: pictures, numbers, and one-line errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import tinystories
from tinystories import cli
from tinystories.checkpoint import BUNDLED_MODEL, read_model
from tinystories.engine.trace.model import TraceModel
from tinystories.explain.text_trace import trace_text

TEXT = 'Tom had a red ball. "Thank you," said Mia.'


def trace(*words: str) -> int:
    return cli.run(cli.cli, ["trace", *words])


@pytest.mark.extended
def test_trace_writes_pictures_and_the_numbers_of_the_python_api(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert trace("--text", TEXT, "--out", str(out), "--layer", "1", "--head", "4", "--last", "6", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    names = ["words.png", "attention.png", "attention-1-4.png", "lens.png", "trace.json"]
    assert facts["files"] == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    files = read_model(BUNDLED_MODEL)
    expected = trace_text(TraceModel.load(files), files.tokenizer(), TEXT)
    assert (facts["tokens"], facts["layer"], facts["head"]) == (len(expected.ids), 1, 4)
    assert facts["mean_bits"] == pytest.approx(expected.mean_bits, abs=1e-4)
    data = json.loads((out / "trace.json").read_text())
    assert [token["id"] for token in data["tokens"]] == expected.ids.tolist()
    for i, row in enumerate(data["attention"]["rows"]):
        np.testing.assert_allclose(row, expected.attention[1, 4, i, : i + 1], atol=1e-4)


@pytest.mark.extended
def test_trace_prints_the_most_surprising_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        trace(str(BUNDLED_MODEL), "--text", "Once upon a volcano", "--out", str(tmp_path), "--precision", "int4") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    bits = [float(line.split()[0]) for line in lines if " bits  rank" in line]
    assert bits == sorted(bits, reverse=True)
    assert lines[0].endswith("·volcano")
    assert lines[-1] == f"  {tmp_path / 'trace.json'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a b" * 600], "shorten the text, or trace its last part with window=True (--window)"),
        (["--text", "a", "--layer", "6"], "layer 6 does not exist: the model has 6"),
        (["--text", "a", "--head", "9"], "head 9 does not exist: a layer has 6"),
        (["--text", "a\udcff"], "the text is not valid text"),
        (["no/such/model", "--text", "a"], "no such model directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace(*words, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert trace("--text", "a", "--out", str(tmp_path / "out")) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert trace("--text", "a", "--out", str(tmp_path / "file" / "out")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_public_names_of_traces_are_lazy() -> None:
    assert tinystories.TextTrace.__module__ == "tinystories.explain.text_trace"
    assert tinystories.NextToken.__module__ == "tinystories.generate.next_token"
