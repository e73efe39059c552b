"""Less memory while training: what is cheap to make again is not kept for the backward pass."""

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class Rematerialized:
    """Stands in the graph for views of one tensor; makes it once more when the first of them is asked for."""

    def __init__(self, tensor: Tensor, recompute: Callable[[], Tensor]) -> None:
        self.storage_ptr = tensor.untyped_storage().data_ptr()
        self.recompute = recompute
        self.n_pending = 0
        self.recomputed: Tensor | None = None

    def pack(self, saved: Tensor) -> "Tensor | SavedView":
        if saved.untyped_storage().data_ptr() != self.storage_ptr:
            return saved
        self.n_pending += 1
        return SavedView(self, saved)


class SavedView:
    """What is kept of a saved tensor: where it lies in the storage of the remade one."""

    def __init__(self, source: Rematerialized, saved: Tensor) -> None:
        self.source = source
        self.layout = (saved.shape, saved.stride(), saved.storage_offset())

    def materialize(self) -> Tensor:
        source = self.source
        recomputed = source.recompute() if source.recomputed is None else source.recomputed
        source.n_pending -= 1
        source.recomputed = recomputed if source.n_pending > 0 else None
        return recomputed.as_strided(*self.layout)


def unpack(saved: "Tensor | SavedView") -> Tensor:
    return saved.materialize() if isinstance(saved, SavedView) else saved


def recompute_in_backward(tensor: Tensor, recompute: Callable[[], Tensor]) -> contextlib.AbstractContextManager[object]:
    """`with remade(y, make):` operations inside that would keep `y` for their backward pass call `make` there instead.

    `make` must give y again, contiguous as y is. Compiled code decides for itself what it keeps.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Rematerialized(tensor, recompute).pack, unpack)


class ReLUFunction(torch.autograd.Function):
    """max(x, 0), whose backward pass writes over the gradient it is given: for an output that one product uses."""

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
    """max(x, 0), to be used once."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.relu(x)
    y: Tensor = ReLUFunction.apply(x)
    return y


def gelu(x: Float[Tensor, "*rest F"], kind: str) -> Float[Tensor, "*rest F"]:
    """x times the normal distribution function of x: exact (`gelu_erf`), or nearly so (`gelu_tanh`)."""
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class GatedSiLUFunction(torch.autograd.Function):
    """silu(gate) * up, keeping nothing but its inputs."""

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
    """silu(gate) * up."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.silu(gate) * up
    product: Tensor = GatedSiLUFunction.apply(gate, up)
    return product
