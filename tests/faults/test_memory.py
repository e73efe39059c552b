"""Sizes that no memory can hold, in settings and in damaged files, are one line; so is memory that runs out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import tinystories
from tinystories.cli.common import run
from tinystories.config import Config
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.hub.card import build_model_card
from tinystories.train.run import train


@pytest.fixture
def model_dir(config: Config, tmp_path: Path) -> Path:
    train(config, tmp_path / "run")
    return tmp_path / "run"


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_with_sampling(model_dir: Path, settings: dict[str, Any]) -> ModelBundle:
    model = ModelBundle.read(model_dir)
    return dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, **settings))


@pytest.mark.parametrize("engine", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["n_ff", "n_layer", "vocab_size", "n_ctx"])
def test_forged_sizes_of_a_model(model_dir: Path, engine: str, name: str) -> None:
    """The case that was found: the torch engine took memory for n_ff before it compared the weights with it."""
    config = json.loads((model_dir / "config.json").read_text())
    change_json(model_dir / "config.json", model=config["model"] | {name: 2**40})
    with pytest.raises(UserError, match=r"expected|too few|memory|vocabulary|at most|must"):
        tinystories.load(model_dir, engine=engine).generate("a", max_tokens=1)


@pytest.mark.parametrize("settings", [{"n_embd": 2**20, "n_head": 16}, {"n_ff": 2**40}, {"n_layer": 2**24}])
def test_a_model_that_is_too_large_to_train(config: Config, tmp_path: Path, settings: dict[str, int]) -> None:
    """The case that was found: the measurement of matrix products came before the estimate of memory."""
    large = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))
    with pytest.raises(UserError, match=r"this run needs about [\d,.]+ GB of memory"):
        train(large, tmp_path / "large")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f4")),  # type: ignore[attr-defined]
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
    ],
    ids=["python", "numpy", "torch", "cuda"],
)
def test_memory_that_runs_out_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        raise error

    assert run(command, []) == 2
    assert capsys.readouterr().err.startswith("error: not enough memory")


@pytest.mark.parametrize("name", ["tokenizer", "data_source", "torch", "step", "license", "name"])
@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, True, 2**80, "\x1b[31m\n"])
def test_a_model_card_of_forged_provenance(model_dir: Path, name: str, value: object) -> None:
    """The case that was found: a list where the name of a tokenizer should be."""
    model = ModelBundle.read(model_dir)
    card = build_model_card(dataclasses.replace(model, provenance=model.provenance | {name: value}))
    assert "\x1b" not in card


@pytest.mark.parametrize("setting", [{"top_k": 2**40}, {"top_k": 2**31}])
def test_a_number_too_large_for_gguf(model_dir: Path, tmp_path: Path, setting: dict[str, int]) -> None:
    """The case that was found: GGUF has 32 bits for top_k. More than the vocabulary means the same as all of it."""
    export(read_with_sampling(model_dir, setting), "gguf", tmp_path / "a.gguf")


@pytest.mark.parametrize("setting", [{"temperature": 1e300}, {"repetition_penalty": 1e200}])
def test_a_float_too_large_for_gguf(model_dir: Path, tmp_path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match="a number that GGUF cannot hold"):
        export(read_with_sampling(model_dir, setting), "gguf", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
