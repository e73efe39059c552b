"""Activation checkpointing: recomputed tensors give the same gradients as stored ones, and are not stored."""

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinystories.config import ModelConfig
from tinystories.model import GPT, gpt
from tinystories.model.loss import Objective
from tinystories.model.recompute import gated_silu, recompute_in_backward


def gradients(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    Objective(model)(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "classic"},
        {"architecture": "classic", "activation": "gelu_tanh", "qkv_bias": True},
        {"architecture": "classic", "activation": "gelu_erf", "learned_positions": True, "window": 5},
        {"architecture": "modern"},
    ],
    ids=str,
)
def test_gradients_are_those_of_keeping_everything(
    monkeypatch: pytest.MonkeyPatch, awake: Any, shape: dict[str, Any], dropout: float
) -> None:
    config = ModelConfig(vocab_size=50, n_ctx=16, n_layer=2, n_embd=24, n_head=2, n_ff=40, dropout=dropout, **shape)
    model = awake(config).train()
    tokens = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    found = gradients(model, tokens)
    monkeypatch.setattr(gpt, "recompute_in_backward", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(gpt, "relu", F.relu)
    monkeypatch.setattr(gpt, "gated_silu", lambda gate, up: F.silu(gate) * up)
    torch.manual_seed(0)
    expected = gradients(model, tokens)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_dropped_tensor_is_recomputed_once_for_all_its_views() -> None:
    x = torch.randn(4, 3, 8, requires_grad=True)
    weights = [torch.randn(5, 8, requires_grad=True) for _ in range(3)]
    made = []

    def make() -> Tensor:
        made.append(1)
        return x.detach().tanh()

    y = x.tanh() + 0  # a tensor of its own, which tanh does not keep
    kept = weakref.ref(y.untyped_storage())
    with recompute_in_backward(y, make):
        total = sum(F.linear(y, weight).square().sum() for weight in weights)
    del y
    assert kept() is None
    assert not made
    total.backward()
    assert len(made) == 1
    expected = torch.autograd.grad(sum(F.linear(x.tanh(), w).square().sum() for w in weights), [x, *weights])
    for found, wanted in zip([x, *weights], expected, strict=True):
        torch.testing.assert_close(found.grad, wanted)


def test_a_graph_may_be_walked_twice() -> None:
    x, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    y = x.tanh()
    with recompute_in_backward(y, x.tanh):
        total = F.linear(y, weight).sum() + F.linear(y, weight).square().sum()
    total.backward(retain_graph=True)
    once = weight.grad.clone() if weight.grad is not None else None
    total.backward()
    assert once is not None
    torch.testing.assert_close(weight.grad, 2 * once)


def test_the_gradient_of_gated_silu() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated_silu, (gate, up))
