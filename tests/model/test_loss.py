"""The fused chunked cross-entropy against PyTorch's, and the logits that it must never allocate."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinystories.config import ModelConfig
from tinystories.model import GPT, loss
from tinystories.model.loss import IGNORE_INDEX, Objective, fused_linear_cross_entropy


def inputs(rows: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * width + vocab_size)
    hidden = torch.randn(rows, width, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, width, dtype=dtype, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (rows,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum", ignore_index=IGNORE_INDEX)


class Record(TorchDispatchMode):
    """Record the largest tensor that any operation returns, and the input dtypes of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if "mm" in str(func):
            self.products.append({argument.dtype for argument in args if isinstance(argument, Tensor)})
        return result


@pytest.mark.parametrize("scale", [1.0, 1 / 37])
def test_the_fused_loss_is_cross_entropy_with_its_gradients(scale: float) -> None:
    hidden, weight, targets = inputs(23, 8, 31)
    targets[::5] = IGNORE_INDEX
    ours, theirs = fused_linear_cross_entropy(hidden, weight, targets), plain(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs)
    found = torch.autograd.grad(ours * scale, (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(theirs * scale, (hidden, weight)), rtol=1e-4, atol=1e-5)


def test_in_double_precision_gradients_agree_to_the_last_digits() -> None:
    """The gradients are written by hand; rounding must not hide a small mistake (sums stay fp32, they cost 1e-7)."""
    hidden, weight, targets = inputs(11, 6, 17, torch.float64)
    found = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_ignored_targets_cost_nothing() -> None:
    hidden, weight, targets = inputs(12, 8, 31)
    targets[4:] = IGNORE_INDEX
    total = fused_linear_cross_entropy(hidden, weight, targets)
    assert total.item() == pytest.approx(fused_linear_cross_entropy(hidden[:4], weight, targets[:4]).item())
    by_hidden, by_weight = torch.autograd.grad(total, (hidden, weight))
    assert (by_hidden[4:] == 0).all()
    assert (by_hidden[:4] != 0).any()
    nothing = fused_linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    assert nothing.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(nothing, (hidden, weight)))
    assert by_weight.abs().max() > 0


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), rows_at_once=st.integers(1, 25), seed=st.integers(0, 2**32))
def test_chunks_do_not_matter(rows: int, rows_at_once: int, seed: int) -> None:
    hidden, weight, targets = inputs(rows, 5, 13)
    targets[torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.2] = IGNORE_INDEX
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "chunk_rows", lambda *_: rows_at_once)
        total = fused_linear_cross_entropy(hidden, weight, targets)
        found = torch.autograd.grad(total, (hidden, weight))
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, weight)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_columns_that_round_the_logits_up_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float
) -> None:
    """As CUDA has them; on a CPU there are none."""
    hidden, weight, targets = inputs(23, 8, 31)
    targets[::5] = IGNORE_INDEX
    hidden = (hidden.detach() * scale).to(dtype).requires_grad_()
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 8)
    without = fused_linear_cross_entropy(hidden, weight, targets)
    expected = torch.autograd.grad(without, (hidden, weight))
    monkeypatch.setattr(loss, "vocab_padding", lambda *_: 9)
    with Record() as record:
        padded = fused_linear_cross_entropy(hidden, weight, targets)
    assert record.largest == max(8 * 40, 40 * 8)
    torch.testing.assert_close(padded, without)
    found = torch.autograd.grad(padded, (hidden, weight))
    assert found[1].shape == weight.shape
    torch.testing.assert_close(found, expected)


def test_chunks_fit_the_device() -> None:
    """On a CPU they fit its caches; on CUDA thousands of rows within 2 GiB, padded to a multiple of 64 columns."""
    assert loss.chunk_rows(4096, "cpu") * 4096 * 4 == 30 * 2**20
    assert loss.chunk_rows(50257, "cpu") == 512
    assert loss.chunk_rows(50257, "cuda") == 8192
    assert all(loss.chunk_rows(size, "cuda") * size * 4 <= 2**31 for size in (2, 1000, 4096, 2**18, 2**28))
    assert [loss.vocab_padding(size, "cuda") for size in (64, 4096, 50257)] == [0, 0, 47]
    assert loss.vocab_padding(50257, "cpu") == loss.vocab_padding(50257, "mps") == 0


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, targets = inputs(9, 8, 31)
    hidden = (hidden.detach() * 1000).requires_grad_()
    total = fused_linear_cross_entropy(hidden, weight, targets)
    assert total.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_full_logits_are_never_held(monkeypatch: pytest.MonkeyPatch, with_gradient: bool) -> None:
    hidden, weight, targets = inputs(64, 4, 300)
    monkeypatch.setattr(loss, "chunk_rows", lambda *_: 8)
    with Record() as record, torch.set_grad_enabled(with_gradient):
        total = fused_linear_cross_entropy(hidden, weight, targets)
        if with_gradient:
            total.backward()
    assert record.largest == 8 * 300
    with Record() as record:
        plain(hidden, weight, targets)
    assert record.largest == 64 * 300, "the recorder sees full logits if they exist"


def test_without_gradients_one_product_is_enough() -> None:
    hidden, weight, targets = inputs(9, 8, 31)
    with Record() as record, torch.no_grad():
        total = fused_linear_cross_entropy(hidden, weight, targets)
    assert len(record.products) == 1
    assert total.item() == pytest.approx(plain(hidden, weight, targets).item())
    assert not total.requires_grad


def test_bf16_states_and_fp32_weights() -> None:
    """The matmul is bf16, softmax and sum are fp32, and each gradient has the dtype of its tensor."""
    hidden, weight, targets = inputs(40, 8, 31)
    rounded = hidden.detach().bfloat16().requires_grad_()
    total = fused_linear_cross_entropy(rounded, weight, targets)
    assert total.dtype == torch.float32
    expected = plain(rounded.float(), weight, targets)
    assert total.item() == pytest.approx(expected.item(), rel=0.01)
    by_hidden, by_weight = torch.autograd.grad(total, (rounded, weight))
    assert (by_hidden.dtype, by_weight.dtype) == (torch.bfloat16, torch.float32)
    for found, right in zip((by_hidden, by_weight), torch.autograd.grad(expected, (rounded, weight)), strict=True):
        assert F.cosine_similarity(found.float().flatten(), right.float().flatten(), dim=0) > 0.999


def test_the_objective_is_the_summed_loss_of_the_model(model: GPT, tokens: Tensor) -> None:
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    ours = Objective(model)(tokens, targets)
    theirs = plain(model.logits(model(tokens)).flatten(0, 1), torch.eye(61), targets.flatten())
    torch.testing.assert_close(ours, theirs)
    weights = list(model.parameters())
    found = torch.autograd.grad(ours, weights)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, weights), rtol=1e-3, atol=1e-4)


def test_under_autocast_every_product_is_bf16(
    tiny: Callable[..., ModelConfig], architecture: str, tokens: Tensor
) -> None:
    """Including the head's, forward and backward: autocast does not cast in-place matmuls by itself."""
    objective = Objective(GPT(tiny(architecture=architecture)))
    with Record() as record:
        with torch.autocast("cpu", torch.bfloat16):
            total = objective(tokens, tokens.flip(1))
        total.backward()
    assert len(record.products) > 10
    assert all(types == {torch.bfloat16} for types in record.products)
    assert total.item() / tokens.numel() == pytest.approx(math.log(61), rel=0.05)
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in objective.parameters())


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    """The hand-written gradients are not differentiable themselves."""
    hidden, weight, targets = inputs(5, 4, 9)
    total = fused_linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(total, hidden, torch.ones((), requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
