"""RMSNorm and its hand-written gradient against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinystories.model.norm import RMSNorm, RMSNormFunction


@pytest.mark.parametrize("shape", [(7,), (1, 5), (3, 4, 6), (2, 3, 4, 8)], ids=str)
def test_values_and_gradients_are_pytorchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator).requires_grad_()
    direction = torch.randn(shape, generator=generator)
    ours = RMSNormFunction.apply(x, weight, 1e-3)
    theirs = F.rms_norm(x, shape[-1:], weight, 1e-3)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours, (x, weight), direction)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, (x, weight), direction))


def test_gradients_are_the_numerical_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: RMSNormFunction.apply(*inputs, 0.1), (x, weight))


def test_eps_decides_about_rows_near_zero() -> None:
    norm = RMSNorm(4, eps=1e-2)
    assert norm(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    assert norm(torch.full((1, 4), 1e-3)).tolist() == [[pytest.approx(1e-2, rel=1e-4)] * 4]


def test_layouts_and_modes_agree() -> None:
    """A transposed input, inference and bf16 give what a plain training step gives."""
    norm = RMSNorm(6, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(4))
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(5)).transpose(1, 2)
    in_training = norm(x)
    torch.testing.assert_close(norm(x.contiguous()), in_training)
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), in_training)
    assert (norm.bfloat16()(x.bfloat16()).float() - in_training).abs().max() < 0.05


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    normed = RMSNorm(3, eps=1e-5)(x)
    (gradient,) = torch.autograd.grad(normed, x, torch.ones(2, 3, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
