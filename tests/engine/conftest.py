"""Tiny models of every shape whose parts all matter: no weight is near zero or one."""

from collections.abc import Callable

import pytest
import torch

from tinystories.config import ModelConfig
from tinystories.model import GPT

SHAPES: dict[str, dict[str, object]] = {
    "classic": {"architecture": "classic", "tied": False},
    "classic-tied": {"architecture": "classic", "tied": True},
    "modern": {"tied": False},
    "modern-grouped-tied": {"n_kv_head": 2, "tied": True},
    "modern-without-qk-norm": {"qk_norm": False, "tied": False},
}


@pytest.fixture(scope="session")
def build() -> Callable[..., GPT]:
    """A fresh model, the same each time, of a small shape with changes."""

    def make(**changes: object) -> GPT:
        small: dict[str, object] = {"vocab_size": 61, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_ff": 48}
        generator = torch.Generator().manual_seed(5)
        model = GPT(ModelConfig(**(small | changes))).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.uniform_(0.5, 1.5, generator=generator)
                else:
                    weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        return model

    return make


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> dict[str, object]:
    return SHAPES[request.param]
