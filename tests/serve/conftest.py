"""Servers with engines whose next token is known, and one with a real model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serve_helpers import GatedEngine, Running, describe, serving

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.build_tokenizer import build_from_spec
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.select import load_engine
from tinystories.files import atomic_directory
from tinystories.model import GPT
from tinystories.serve.model import ServedModel

TEXT = "Once upon a time there was a cat. The cat sat on a mat and was happy. “Hello”, said the 🐈 to the naïve dog."
CERTAINTY = 30  # what the logits of a random model are multiplied by
Serve = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_from_spec("bpe:300", lambda: [TEXT] * 3)


@pytest.fixture(scope="session")
def serve_chaotic(tokenizer: Tokenizer) -> Serve:
    """Random logits, others for every content of a slot; END is as likely as `end` says."""

    def start(*, end: float = 0.0, n_ctx: int = 64, n_slots: int = 2, **settings: Any) -> Any:
        def rule(ids: list[int]) -> np.ndarray:
            logits = np.random.default_rng(ids).normal(size=tokenizer.vocab_size).astype(np.float32)
            logits[tokenizer.end_id] = np.log(max(end, 1e-30) * tokenizer.vocab_size)
            return logits

        engine = GatedEngine(rule, tokenizer.vocab_size, n_ctx=n_ctx, n_slots=n_slots)
        return serving(engine, describe(tokenizer, engine), **settings)

    return start


@pytest.fixture
def chaotic(serve_chaotic: Serve) -> Iterator[Running]:
    with serve_chaotic() as running:
        yield running


@pytest.fixture(scope="session")
def serve_script(tokenizer: Tokenizer) -> Serve:
    """Says a text after any prompt, and then END; the prompt must not begin like the text."""

    def start(text: str, *, n_ctx: int = 512, n_slots: int = 2, **settings: Any) -> Any:
        script = tokenizer.encode(text)

        def rule(ids: list[int]) -> np.ndarray:
            n_said = next((n for n in range(len(script), 0, -1) if ids[-n:] == script[:n]), 0)
            logits = np.random.default_rng(len(ids)).normal(size=tokenizer.vocab_size).astype(np.float32)
            logits[script[n_said] if n_said < len(script) else tokenizer.end_id] = 40
            return logits

        engine = GatedEngine(rule, tokenizer.vocab_size, n_ctx=n_ctx, n_slots=n_slots)
        return serving(engine, describe(tokenizer, engine), **settings)

    return start


@pytest.fixture(scope="session")
def model_folder(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small random model."""
    model = awake(ModelConfig(vocab_size=400, n_ctx=96, n_layer=2, n_head=4, n_embd=32, n_ff=48, tied=False))
    folder = tmp_path_factory.mktemp("serve") / "model"
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(temperature=1.5), {})
    return folder


@pytest.fixture(scope="session")
def certain_folder(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small random model that is often nearly certain of the next token."""
    model = awake(ModelConfig(vocab_size=400, n_ctx=96, n_layer=2, n_head=4, n_embd=32, n_ff=48, tied=False))
    with torch.no_grad():
        model.lm_head.weight *= CERTAINTY
    folder = tmp_path_factory.mktemp("serve") / "certain"
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(), {})
    return folder


@pytest.fixture(scope="session")
def serve_model(model_folder: Path) -> Serve:
    """An engine on the small model, or on another one."""

    def start(
        *,
        engine: str = "cpu",
        precision: str = "int8",
        n_slots: int = 4,
        folder: Path = model_folder,
        **settings: Any,
    ) -> Any:
        threads = 1 if engine == "cpu" else None
        config = EngineConfig(engine=engine, device="cpu", precision=precision, n_slots=n_slots, threads=threads)
        files, loaded = load_engine(folder, config)
        model = ServedModel.describe(files, name="small", engine_name=config.engine, precision=precision)
        return serving(loaded, model, **settings)

    return start
