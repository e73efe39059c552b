"""Less memory while training: what is cheap to make again is not kept for the backward pass."""

import contextlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class Remade:
    """Stands in the graph for views of one tensor; makes it once more when the first of them is asked for."""

    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.storage = tensor.untyped_storage().data_ptr()
        self.make = make
        self.asked_for = 0
        self.again: Tensor | None = None

    def pack(self, saved: Tensor) -> "Tensor | View":
        if saved.untyped_storage().data_ptr() != self.storage:
            return saved
        self.asked_for += 1
        return View(self, saved)


class View:
    """What is kept of a saved tensor: where it lies in the storage of the remade one."""

    def __init__(self, remade: Remade, saved: Tensor) -> None:
        self.remade = remade
        self.place = (saved.shape, saved.stride(), saved.storage_offset())

    def tensor(self) -> Tensor:
        remade = self.remade
        again = remade.make() if remade.again is None else remade.again
        remade.asked_for -= 1
        remade.again = again if remade.asked_for > 0 else None
        return again.as_strided(*self.place)


def unpack(kept: "Tensor | View") -> Tensor:
    return kept.tensor() if isinstance(kept, View) else kept


def remade(tensor: Tensor, make: Callable[[], Tensor]) -> contextlib.AbstractContextManager[object]:
    """`with remade(y, make):` operations inside that would keep `y` for their backward pass call `make` there instead.

    `make` must give y again, contiguous as y is. Compiled code decides for itself what it keeps.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Remade(tensor, make).pack, unpack)


class Relu(torch.autograd.Function):
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
    y: Tensor = Relu.apply(x)
    return y


def gelu(x: Float[Tensor, "*rest F"], kind: str) -> Float[Tensor, "*rest F"]:
    """x times the normal distribution function of x: exact (`gelu_erf`), or nearly so (`gelu_tanh`)."""
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class GatedSilu(torch.autograd.Function):
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
    product: Tensor = GatedSilu.apply(gate, up)
    return product
