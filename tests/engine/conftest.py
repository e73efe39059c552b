"""Tiny models of every shape whose parts all matter: no weight is near zero or one."""

from collections.abc import Callable

import pytest
from shapes import SHAPES

from tinystories.config import ModelConfig
from tinystories.model import GPT


@pytest.fixture(scope="session")
def build(awake: Callable[[ModelConfig], GPT]) -> Callable[..., GPT]:
    """A fresh model, the same each time, of a small shape with changes."""

    def make(**changes: object) -> GPT:
        small: dict[str, object] = {"vocab_size": 61, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_ff": 48}
        return awake(ModelConfig(**(small | changes)))  # type: ignore[arg-type]

    return make


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> dict[str, object]:
    return SHAPES[request.param]
