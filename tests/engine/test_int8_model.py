"""A model that ships with packed weights alone is the model that it was made from, rounded to int8, in every engine."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import saved

from tinystories import checkpoint
from tinystories.checkpoint import INT8_WEIGHTS, WEIGHTS
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.files import sha256
from tinystories.model import GPT
from tinystories.weights import quantize
from tinystories.weights.load import load_fp32, load_int8_only, write_int8_model
from tinystories.weights.names import expected_shapes
from tinystories.weights.safetensors_file import SafetensorsFile, write_safetensors

IDS = [7, 3, 9, 1, 4, 300, 2]


@pytest.fixture(params=["tied", "untied", "classic"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    changes = {"tied": {}, "untied": {"tied": False}, "classic": {"architecture": "classic", "tied": False}}
    shape: dict[str, object] = {"vocab_size": 400, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 40, "n_ff": 52}
    return ModelConfig(**(shape | changes[request.param]))  # type: ignore[arg-type]


@pytest.fixture
def whole(config: ModelConfig, awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path: Path) -> Path:
    return saved(tmp_path / "whole", awake(config), sample_data, SamplingConfig(top_k=7), {"tokens": 3})


@pytest.fixture
def small(whole: Path, tmp_path: Path) -> Path:
    write_int8_model(checkpoint.read_model(whole), tmp_path / "small")
    return tmp_path / "small"


def test_an_int8_model_is_a_complete_directory_of_a_quarter_of_the_size(whole: Path, small: Path) -> None:
    before, after = checkpoint.read_model(whole), checkpoint.read_model(small)
    assert (after.config, after.sampling, after.provenance) == (before.config, before.sampling, before.provenance)
    assert after.tokenizer().sha256 == before.tokenizer().sha256
    assert {path.name for path in small.iterdir()} == {INT8_WEIGHTS, "tokenizer.json", "generation.json", "config.json"}
    assert (small / INT8_WEIGHTS).stat().st_size < 0.5 * (
        whole / WEIGHTS
    ).stat().st_size  # tiny shapes are mostly filling


def test_int8_logits_are_those_of_the_original_to_the_last_bit(whole: Path, small: Path) -> None:
    before, after = (CpuEngine.load(checkpoint.read_model(folder)).prefill(0, IDS) for folder in (whole, small))
    assert (before == after).all()


def test_other_engines_and_precisions_have_the_rounded_weights(whole: Path, small: Path) -> None:
    files = checkpoint.read_model(small)
    original, rounded = load_fp32(checkpoint.read_model(whole)), load_fp32(files)
    for name, weight in original.items():
        assert rounded[name].shape == weight.shape
        step = np.abs(weight).max(axis=-1, keepdims=True) / 127 if weight.ndim == 2 else 0
        assert (np.abs(rounded[name] - weight) <= 0.51 * step).all()
    exact = CpuEngine.load(files, EngineConfig(precision="fp32")).prefill(0, IDS)
    assert np.abs(TorchEngine.load(files, EngineConfig(device="cpu")).prefill(0, IDS) - exact).max() < 1e-4
    assert np.abs(CpuEngine.load(files, EngineConfig(precision="int8")).prefill(0, IDS) - exact).max() < 0.01
    assert np.corrcoef(CpuEngine.load(files, EngineConfig(precision="int4")).prefill(0, IDS), exact)[0, 1] > 0.9


@pytest.mark.parametrize("engine", [CpuEngine, TorchEngine])
def test_damaged_weights_are_an_error_without_another_copy(small: Path, engine: type[CpuEngine | TorchEngine]) -> None:
    data = bytearray((small / INT8_WEIGHTS).read_bytes())
    data[-200] ^= 1
    (small / INT8_WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="does not match its checksum"):
        checkpoint.read_model(small)
    files = checkpoint.read_model(small, verify_weights=False)
    with pytest.raises(UserError, match=r"packed-int8\.safetensors is damaged .*no other copy"):
        engine.load(files)
    assert len(list(small.iterdir())) == 4  # nothing was made in its place


def rewrite_in_layout_2(folder: Path) -> None:
    """Write the weights as earlier versions did: blocks of 8 rows, columns padded to a multiple of 8."""
    files = checkpoint.read_model(folder)
    path, tensors = folder / INT8_WEIGHTS, {}
    file = SafetensorsFile(path)
    for name, array in file.items():
        if name.endswith(".filling"):
            continue
        weight, _, kind = name.rpartition(".")
        shape = expected_shapes(files.config).get(weight)
        if shape and f"{weight}.int8" in file:
            rows, columns = quantize.round_up(shape[0], 8), quantize.round_up(shape[1], 8)
            if kind == "int8":
                padded = np.zeros((rows, columns), dtype=np.int8)
                padded[: shape[0], : shape[1]] = quantize.unpack_int8(array, *shape)
                blocks = padded.reshape(-1, 8, columns // 2, 2).transpose(0, 2, 1, 3)
                array = np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)
            else:
                array = array[:rows]
        tensors[name] = array
    write_safetensors(path, tensors, {k: v for k, v in file.metadata.items() if k != "sha256"} | {"layout": "2"})
    described = json.loads((folder / "config.json").read_text())
    described["files"][INT8_WEIGHTS] = sha256(path)
    (folder / "config.json").write_text(json.dumps(described))


def test_weights_in_the_layout_of_earlier_versions_are_converted(small: Path, tmp_path: Path) -> None:
    """Logits to the last bit; and `quantize --out` writes them in the present layout, with the same integers."""
    before = checkpoint.read_model(small)
    expected = CpuEngine.load(before).prefill(0, IDS)
    current, exact = dict(load_int8_only(before)), load_fp32(before)
    rewrite_in_layout_2(small)
    old = checkpoint.read_model(small)
    assert (CpuEngine.load(old).prefill(0, IDS) == expected).all()
    assert all((weight == exact[name]).all() for name, weight in load_fp32(old).items())
    write_int8_model(old, tmp_path / "converted")
    converted = load_int8_only(checkpoint.read_model(tmp_path / "converted"))
    assert isinstance(converted, SafetensorsFile)  # mapped, not a copy
    assert converted.metadata["layout"] == "3"
    assert converted.keys() == current.keys()
    assert all((array == current[name]).all() for name, array in converted.items())


def test_weights_in_an_unknown_layout_are_refused(small: Path) -> None:
    path = small / INT8_WEIGHTS
    file = SafetensorsFile(path)
    tensors = {name: array for name, array in file.items() if not name.endswith(".filling")}
    write_safetensors(path, tensors, {k: v for k, v in file.metadata.items() if k != "sha256"} | {"layout": "4"})
    with pytest.raises(UserError, match="made by another version of tinystories"):
        CpuEngine.load(checkpoint.read_model(small, verify_weights=False))


def test_another_layout_is_refused(small: Path) -> None:
    described = json.loads((small / "config.json").read_text())
    described["model"]["n_ff"] += 8
    (small / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="is damaged"):
        CpuEngine.load(checkpoint.read_model(small))
