"""Tiny models whose every part matters: weights far from their initial values, in every shape the config allows."""

from collections.abc import Callable

import pytest
import torch

from tinystories.config import ModelConfig
from tinystories.model import GPT

SHAPES: dict[str, dict[str, object]] = {
    "classic": {"architecture": "classic", "n_ff": 32, "tied": False},
    "classic-tied": {"architecture": "classic", "n_ff": 32, "tied": True},
    "classic-as-gpt2": {
        "architecture": "classic",
        "learned_positions": True,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "tied": True,
    },
    "classic-as-gpt-neo": {
        "architecture": "classic",
        "learned_positions": True,
        "activation": "gelu_erf",
        "scaled_scores": False,
        "window": 5,
        "tied": False,
    },
    "modern": {"tied": False},
    "modern-grouped-tied": {"n_kv_head": 2, "tied": True},
    "modern-one-kv-head": {"n_kv_head": 1, "tied": False},
    "modern-without-qk-norm": {"qk_norm": False, "tied": False},
    "modern-head-size": {"head_size": 10, "n_kv_head": 2, "tied": True},
}


@pytest.fixture(scope="session", params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest, tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]) -> GPT:
    return awake(tiny(**SHAPES[request.param]))


@pytest.fixture(scope="session", params=("classic", "modern"))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of twelve ids under 61."""
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
