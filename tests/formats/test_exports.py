"""What holds for every format: a file that says what the model says, or none at all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from format_helpers import Build

from tinystories.cli import cli
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import compare_logits, export
from tinystories.formats.html.check import find_runner
from tinystories.formats.imports import import_model
from tinystories.formats.registry import EXPORT_NAMES, FORMATS

# kind -> formats that hold it; what is not here is refused
HOLDS = {
    "the original": {"hf", "onnx", "html"},
    "gpt2": {"hf", "gguf", "onnx", "html"},
    "gpt_neo": {"hf", "onnx", "html"},
    "llama": {"hf", "gguf", "llama2c", "onnx", "html"},
    "qwen3": {"hf", "gguf", "onnx", "html"},
}


@pytest.mark.parametrize("name", EXPORT_NAMES)
@pytest.mark.parametrize("kind", HOLDS)
@pytest.mark.parametrize("learned", [False, True], ids=["random", "trained"])
def test_every_model_survives_every_format_bit_for_bit(
    portable: Build, tmp_path: Path, kind: str, name: str, learned: bool
) -> None:
    """In fp32 to the last bit; what a format cannot hold is refused, and leaves nothing."""
    model, out = portable(kind, learned), tmp_path / "out" / "story.bin"
    if name not in HOLDS[kind]:
        with pytest.raises(UserError):
            export(model, name, out)
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return
    done = export(model, name, out)
    assert out in done.paths
    assert sorted(done.paths) == sorted(out.parent.iterdir())
    if name == "html":
        assert done.is_verified == (find_runner() is not None)
        return  # int8, and run instead of read back: tests/formats/html
    assert done.max_difference <= 1e-4
    assert done.n_ids == (64 if learned else 24)
    if name == "onnx":
        return  # for running alone
    back = import_model(str(out))
    assert back.config == model.config
    assert back.weights.keys() == model.weights.keys()
    order = ids_of(back, model) if name == "llama2c" else list(range(400))  # it has its own ids for END and bytes
    for weight, expected in model.weights.items():
        found = back.weights[weight]
        assert ((found[order] if len(found) == 400 else found) == expected).all(), weight
    text = "Once upon a time, Lily saw 3 naïve cats.\n\n“Hi!” she said."
    assert back.tokenizer.encode(text) == [order[i] for i in model.tokenizer.encode(text)]
    assert back.tokenizer.end_id == order[model.tokenizer.end_id]
    back.write(tmp_path / "back")
    assert ModelBundle.read(tmp_path / "back").config == model.config


def ids_of(back: ModelBundle, model: ModelBundle) -> list[int]:
    """The id in `back` of each of the model's tokens."""
    vocabs = [
        json.loads(one.tokenizer.json_text)["model"]["vocab"] | {END: one.tokenizer.end_id} for one in (back, model)
    ]
    return [vocabs[0][name] for name in sorted(vocabs[1], key=vocabs[1].__getitem__)]


@pytest.mark.parametrize("wrong", ["one weight", "not a number", "shape"])
def test_a_file_that_says_something_else_is_not_kept(
    portable: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    model = portable("llama")

    def spoilt(_: Path, ids: list[int]) -> np.ndarray:
        logits = model.logits(ids).copy()
        if wrong == "shape":
            return logits[1:]
        logits[3, 7] = np.nan if wrong == "not a number" else logits[3, 7] + 1e-3
        return logits

    monkeypatch.setitem(FORMATS, "hf", dataclasses.replace(FORMATS["hf"], logits=spoilt))
    with pytest.raises(UserError, match="verification failed"):
        export(model, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_offers_every_export_format() -> None:
    command = cli.get_command(None, "export")
    assert command is not None
    (choice,) = [option.type for option in command.params if option.name == "name"]
    assert sorted(choice.choices) == sorted(EXPORT_NAMES)


def test_nothing_is_replaced_unless_asked(portable: Build, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a thesis")
    with pytest.raises(UserError, match=r"out exists; .*--force"):
        export(portable("llama"), "llama2c", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a thesis"
    done = export(portable("llama"), "llama2c", tmp_path / "out", force=True)
    assert (tmp_path / "out").stat().st_size > 1000
    assert sorted(tmp_path.iterdir()) == sorted(done.paths)


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("h5", "", "--format h5 .* use one of gguf, hf, llama2c, onnx, html$"),
        ("hf", "q4_0", "--precision q4_0; use f32"),
    ],
)
def test_an_unknown_format_or_precision_is_named(
    portable: Build, tmp_path: Path, name: str, precision: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(portable("llama"), name, tmp_path / "out", precision=precision)


def test_a_place_that_cannot_be_written_is_named(portable: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export(portable("llama"), "llama2c", tmp_path / "file" / "out")


def test_differences_are_of_logits_and_of_what_they_predict() -> None:
    ours = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    assert compare_logits(ours, ours + 3) == (3, pytest.approx(0, abs=1e-12))  # adding a number changes no prediction
    theirs = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    largest, divergence = compare_logits(ours, theirs)
    assert largest == pytest.approx(np.log(2))
    assert divergence == pytest.approx(0.25 * np.log(2) / 2)
    assert compare_logits(100 * ours, 100 * ours + 1)[0] == pytest.approx(10 / (100 * np.log(10)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"", "unknown format"), (b"\x89PNG123", "unknown format")],
)
def test_files_of_no_known_kind_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.xyz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_model(str(path))
