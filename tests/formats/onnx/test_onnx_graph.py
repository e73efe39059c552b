"""ONNX Runtime says of the exported graph what our engine says of the model, with and without a past."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from format_helpers import Build, bundle_of
from shapes import SHAPES

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import train_bpe
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.onnx import builder as onnx_builder
from tinystories.formats.onnx import format as onnx_format
from tinystories.model import GPT

MORE: dict[str, dict[str, object]] = SHAPES | {
    "modern-tied": {"tied": True},
    "modern-one-kv-head": {"n_kv_head": 1, "tied": False},
}
DOCS = Path(__file__).parents[3] / "docs" / "interop.md"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(300, iter_stories("sample"))


@pytest.fixture(scope="session")
def build(tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], tokenizer: Tokenizer) -> Build:
    def make(**changes: object) -> ModelBundle:
        gpt = awake(tiny(**{"vocab_size": tokenizer.vocab_size, **changes}))
        return bundle_of(gpt, tokenizer)

    return make


@pytest.fixture(params=MORE)
def model(request: pytest.FixtureRequest, build: Build) -> ModelBundle:
    return build(**MORE[request.param])


def written(model: ModelBundle, folder: Path) -> Path:
    onnx_format.write(model, folder / "m.onnx", "f32")
    return folder / "m.onnx"


def some_ids(model: ModelBundle, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(model.config.vocab_size, size=n).tolist()


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx_runtime_gives_the_models_logits_up_to_the_last_position(model: ModelBundle, tmp_path: Path) -> None:
    """`logits` has compared the reading with a past, in parts of 1, 4 and the rest."""
    ids = some_ids(model, model.config.n_ctx)
    ours = model.logits(ids)
    assert ours.std() > 0.5, "logits too flat to compare"
    assert np.abs(onnx_format.logits(written(model, tmp_path), ids) - ours).max() <= 1e-4


@pytest.mark.parametrize("ends", [(1, 2, 3, 4), (12,), (23,), (3, 3, 20)])
def test_parts_of_any_length_may_follow_each_other(model: ModelBundle, tmp_path: Path, ends: tuple[int, ...]) -> None:
    ids = some_ids(model, 24)
    told = onnx_format.run_chunks(session_of(written(model, tmp_path)), np.split(np.array(ids), ends))
    assert np.abs(told - model.logits(ids)).max() <= 1e-4


def feeds_of(session: Any, ids: np.ndarray, mask: np.ndarray, past: list[np.ndarray] | None) -> dict[str, np.ndarray]:
    """Positions as Optimum and transformers.js make them of the mask."""
    names = [given.name for given in session.get_inputs()]
    shape = session.get_inputs()[-1].shape
    past = past or [np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)] * (len(names) - 3)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 1)[:, -ids.shape[1] :]
    return dict(zip(names, [ids, mask, positions, *past], strict=True))


@pytest.mark.parametrize("padding", [slice(0, 5), slice(8, 13)])
def test_rows_of_a_batch_know_nothing_of_each_other_nor_of_padding(
    model: ModelBundle, tmp_path: Path, padding: slice
) -> None:
    if model.config.window and padding.start:
        pytest.skip("padding inside a text counts in the window")
    session = session_of(written(model, tmp_path))
    split = 11
    long, short = some_ids(model, 20), some_ids(model, 15, seed=1)
    ids, mask = np.array([long, long]), np.ones((2, 20), np.int64)
    mask[1, padding] = 0
    ids[1, mask[1] == 1] = short
    first, *past = session.run(None, feeds_of(session, ids[:, :split], mask[:, :split], None))
    second, *_ = session.run(None, feeds_of(session, ids[:, split:], mask, past))
    told = np.concatenate((first, second), axis=1)
    assert np.isfinite(told).all(), "also where everything is padding"
    assert np.abs(told[0] - model.logits(long)).max() <= 1e-4
    assert np.abs(told[1, mask[1] == 1] - model.logits(short)).max() <= 1e-4


def test_more_ids_than_the_context_are_refused(model: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot run it"):
        onnx_format.logits(written(model, tmp_path), some_ids(model, model.config.n_ctx + 1))


def test_the_file_is_valid_and_the_same_each_time(model: ModelBundle, tmp_path: Path) -> None:
    path = written(model, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    first = path.read_bytes()
    assert written(model, tmp_path).read_bytes() == first


def test_weights_are_stored_once_and_as_they_are(model: ModelBundle, tmp_path: Path) -> None:
    proto = onnx.load(written(model, tmp_path))
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in proto.graph.initializer}
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(arrays.pop(name), weight, strict=True)
    allowed = 2 * model.config.n_ctx * max(model.config.n_embd, model.config.head_dim)  # tables of positions
    assert sum(array.size for array in arrays.values()) <= allowed + 100


def test_inputs_outputs_and_metadata_have_the_names_of_optimum(build: Build, tmp_path: Path) -> None:
    model = build(n_kv_head=2)
    path = written(model, tmp_path)
    proto = onnx.load(path)
    assert (proto.opset_import[0].version, proto.ir_version) == (17, 8), "what ONNX Runtime of two years ago reads"
    assert {p.key: p.value for p in proto.metadata_props} == {
        "architecture": "modern",
        "end_id": str(model.tokenizer.end_id),
        "n_ctx": "24",
    }
    assert (proto.producer_name, proto.model_version) == ("tinystories-gpt", 1)
    session = session_of(path)
    past, batch = ["batch_size", 2, "past_sequence_length", 6], ["batch_size", "sequence_length"]
    assert [(given.name, given.shape) for given in session.get_inputs()] == [
        ("input_ids", batch),
        ("attention_mask", ["batch_size", "total_sequence_length"]),
        ("position_ids", batch),
        *((f"past_key_values.{i}.{part}", past) for i in (0, 1) for part in ("key", "value")),
    ]
    assert [told.name for told in session.get_outputs()] == [
        "logits",
        *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value")),
    ]


def test_export_brings_the_tokenizer(build: Build, tmp_path: Path) -> None:
    model = build()
    done = export(model, "onnx", tmp_path / "tales.v1.onnx")
    assert [path.name for path in done.paths] == ["tales.v1.onnx", "tales.v1.onnx.tokenizer.json"]
    assert done.max_difference <= 1e-4
    assert Tokenizer.load(done.paths[1]).sha256 == model.tokenizer.sha256


def test_a_past_that_changes_the_logits_is_found(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without causality the ids read at once see more than those read in parts."""
    monkeypatch.setattr(onnx_builder.DecoderBuilder, "causal_mask", lambda decoder, _: decoder.graph.add_scalar(0.0))
    model = build()
    with pytest.raises(UserError, match="with and without the KV cache differ by"):
        onnx_format.logits(written(model, tmp_path), some_ids(model, 24))


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_cut_file_is_refused(build: Build, tmp_path: Path, share: float) -> None:
    model = build()
    path = written(model, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"m\.onnx: ONNX Runtime cannot run it: [^\n]+$"):
        onnx_format.logits(path, some_ids(model, 8))


def test_weights_above_two_gigabytes_are_refused(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_format, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(UserError, match=r"2 GB.*--format hf"):
        export(build(), "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'{name}: pip install "tinystories-gpt\[export\]"'):
        export(build(), "onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_program_in_the_docs_writes_what_the_model_would(
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = build(n_ctx=40)
    export(model, "onnx", tmp_path / "stories.onnx")
    program = DOCS.read_text(encoding="utf-8").split("## ONNX\n")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "story.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    end = runpy.run_path("story.py")
    ids = [int(i) for i in end["ids"]]
    assert len(ids) == 40 or end["new"] == [model.tokenizer.end_id]
    assert np.abs(end["logits"][0, -1] - model.logits(ids)[-1]).max() <= 1e-4
    told = capfd.readouterr()
    assert told.out.startswith("Once upon a time")
    assert told.err == ""
