"""Activation checkpointing (rematerialization): cheap activations are recomputed in the backward pass, not stored.

Autograd normally keeps the inputs of every matmul until the backward pass. Norms and activation functions are cheap,
so their outputs are dropped after the forward pass and recomputed when the backward pass first needs them.
`torch.utils.checkpoint` would rerun whole blocks, matmuls included.
"""

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class Rematerialized:
    """One dropped tensor. Its saved views share a single recomputation, which is freed with the last of them."""

    def __init__(self, tensor: Tensor, recompute: Callable[[], Tensor]) -> None:
        self.storage_ptr = tensor.untyped_storage().data_ptr()
        self.recompute = recompute
        self.n_pending = 0
        self.recomputed: Tensor | None = None

    def pack(self, saved: Tensor) -> "Tensor | SavedView":
        """Replace a saved view of the dropped tensor by a `SavedView`; return other tensors unchanged."""
        if saved.untyped_storage().data_ptr() != self.storage_ptr:
            return saved
        self.n_pending += 1
        return SavedView(self, saved)


class SavedView:
    """Placeholder that autograd saves instead of a view of the dropped tensor: shape, strides and offset only."""

    def __init__(self, source: Rematerialized, saved: Tensor) -> None:
        self.source = source
        self.layout = (saved.shape, saved.stride(), saved.storage_offset())

    def materialize(self) -> Tensor:
        """Return the view, recomputing the tensor unless another of its views already has."""
        source = self.source
        recomputed = source.recompute() if source.recomputed is None else source.recomputed
        source.n_pending -= 1
        source.recomputed = recomputed if source.n_pending > 0 else None
        return recomputed.as_strided(*self.layout)


def unpack(saved: "Tensor | SavedView") -> Tensor:
    """Return the tensor that `Rematerialized.pack` was called with, or an equal one."""
    return saved.materialize() if isinstance(saved, SavedView) else saved


def recompute_in_backward(tensor: Tensor, recompute: Callable[[], Tensor]) -> contextlib.AbstractContextManager[object]:
    """Return a context in which autograd does not store `tensor` but calls `recompute` in the backward pass.

    This affects operations inside the context that save `tensor` or a view of it. `recompute` must return an equal
    tensor, contiguous like the original. Does nothing under torch.compile, which chooses what to recompute by itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Rematerialized(tensor, recompute).pack, unpack)


class ReLUFunction(torch.autograd.Function):
    """ReLU whose backward pass overwrites the incoming gradient, so its output must be used only once."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Float[Tensor, "*rest F"]) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "*rest F"]) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


def relu(x: Float[Tensor, "*rest F"]) -> Float[Tensor, "*rest F"]:
    """Return max(x, 0). In training the result must be used only once (see `ReLUFunction`)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.relu(x)
    y: Tensor = ReLUFunction.apply(x)
    return y


def gelu(x: Float[Tensor, "*rest F"], kind: str) -> Float[Tensor, "*rest F"]:
    """Return GELU of x: exact for `kind` = "gelu_erf", GPT-2's tanh approximation for "gelu_tanh"."""
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class GatedSiLUFunction(torch.autograd.Function):
    """silu(gate) * up; saves only its inputs and recomputes silu(gate) in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Float[Tensor, "*rest F"], up: Float[Tensor, "*rest F"]) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "*rest F"]) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated_silu(gate: Float[Tensor, "*rest F"], up: Float[Tensor, "*rest F"]) -> Float[Tensor, "*rest F"]:
    """Return silu(gate) * up, the gated activation of SwiGLU."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.silu(gate) * up
    product: Tensor = GatedSiLUFunction.apply(gate, up)
    return product
