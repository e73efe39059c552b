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
from tinystories.model import GPT
from tinystories.weights.load import load_fp32, write_int8_model

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


def test_another_layout_is_refused(small: Path) -> None:
    described = json.loads((small / "config.json").read_text())
    described["model"]["n_ff"] += 8
    (small / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="is damaged"):
        CpuEngine.load(checkpoint.read_model(small))
