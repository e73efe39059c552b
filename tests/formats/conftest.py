"""Tiny models with a tokenizer, in every shape that some other program knows."""

import functools
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from format_helpers import GPT2, bundle_of

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.formats.bundle import ModelBundle
from tinystories.model import GPT

hypothesis.settings.register_profile("no deadline", deadline=None)  # the time of a test depends on the machine
hypothesis.settings.load_profile("no deadline")

KINDS: dict[str, dict[str, object]] = {
    "the original": {"architecture": "classic", "tied": False},
    "gpt2": GPT2 | {"qkv_bias": True},
    "gpt_neo": GPT2 | {"scaled_scores": False, "window": 5},
    "llama": {"qk_norm": False},
    "qwen3": {"n_kv_head": 2, "tied": False},
}


@pytest.fixture(scope="session")
def portable(
    awake: Callable[[ModelConfig], GPT], trained: Callable[[ModelConfig], tuple[GPT, np.ndarray]], sample_data: Path
) -> Callable[..., ModelBundle]:
    """A model of a kind whose logits depend on everything it read, or one that has learned some words."""

    @functools.cache
    def build(kind: str, learned: bool = False) -> ModelBundle:
        shape = {"vocab_size": 400, "n_layer": 2, "n_head": 4, "norm_eps": 1e-5}
        sizes = {"n_ctx": 128, "n_embd": 64, "n_ff": 128} if learned else {"n_ctx": 24, "n_embd": 32, "n_ff": 64}
        config = ModelConfig(**(shape | sizes | KINDS[kind]))  # type: ignore[arg-type]
        model = trained(config)[0] if learned else awake(config)
        sampling = SamplingConfig(temperature=0.7, top_k=9)
        return bundle_of(model, Tokenizer.load(sample_data), sampling=sampling, provenance={"tokens_seen": 5})

    return build
