"""Tiny models in every shape the config allows, with weights far from initialization so that every part matters."""

from collections.abc import Callable

import pytest
import torch
from shapes import SHAPES

from tinystories.config import ModelConfig
from tinystories.model import GPT

MORE: dict[str, dict[str, object]] = SHAPES | {"modern-one-kv-head": {"n_kv_head": 1, "tied": False}}


@pytest.fixture(scope="session", params=MORE, ids=str)
def model(request: pytest.FixtureRequest, tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]) -> GPT:
    return awake(tiny(**MORE[request.param]))


@pytest.fixture(scope="session", params=("classic", "modern"))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of twelve ids below 61."""
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
