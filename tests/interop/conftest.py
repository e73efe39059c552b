"""Tiny models with a tokenizer, in every shape that some other program knows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tinystories.checkpoint import saved_weights
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.interop.portable import Portable
from tinystories.model import GPT

GPT2 = {"architecture": "classic", "learned_positions": True, "activation": "gelu_tanh"}
KINDS: dict[str, dict[str, object]] = {
    "the original": {"architecture": "classic", "tied": False},
    "gpt2": GPT2 | {"qkv_bias": True},
    "gpt_neo": GPT2 | {"scaled_scores": False, "window": 5},
    "llama": {"qk_norm": False},
    "qwen3": {"n_kv_head": 2, "tied": False},
}


@pytest.fixture(scope="session")
def portable(awake: Callable[[ModelConfig], GPT], sample_data: Path) -> Callable[[str], Portable]:
    """A model of a kind; its logits depend on everything it read."""

    def build(kind: str) -> Portable:
        shape = {"vocab_size": 400, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_ff": 64, "norm_eps": 1e-5}
        model = awake(ModelConfig(**(shape | KINDS[kind])))  # type: ignore[arg-type]
        return Portable(
            config=model.config,
            weights={name: weight.numpy() for name, weight in saved_weights(model).items()},
            tokenizer=Tokenizer.load(sample_data),
            sampling=SamplingConfig(temperature=0.7, top_k=9),
            provenance={"tokens_seen": 5},
        )

    return build
