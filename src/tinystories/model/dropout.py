"""Dropout whose random numbers are cheap on a CPU."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Four activations share one 64-bit random number: each is compared with a 16-bit threshold.
LEVELS = 2**16


class DropoutFunction(torch.autograd.Function):
    """x * keep / keep_probability. Stores one byte per activation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Float[Tensor, "*rest C"], keep: Bool[Tensor, "*rest C"], scale: float
    ) -> Float[Tensor, "*rest C"]:
        ctx.save_for_backward(keep)
        ctx.scale = scale  # type: ignore[attr-defined]
        return (x * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "*rest C"]) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad * keep).mul_(ctx.scale), None, None  # type: ignore[attr-defined]


class FastDropout(nn.Module):
    """`nn.Dropout` with fewer random numbers: torch's CPU generator draws 64 bits for four activations.

    The same seed gives the same activations, but others than with `nn.Dropout`. The probability is rounded to a
    multiple of 2^-16, and the remaining activations are scaled by the rounded one, so their mean is exact.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.n_dropped_levels = min(round(p * LEVELS), LEVELS - 1)

    def forward(self, x: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest C"]:
        if not self.training:
            return x
        n_draws = -(-x.numel() // 4)
        draws = torch.empty(n_draws, dtype=torch.int64).random_(-(2**63), None)
        levels = draws.view(torch.int16)[: x.numel()].view(x.shape)
        keep = levels >= self.n_dropped_levels - LEVELS // 2  # int16 begins at -LEVELS / 2
        y: Tensor = DropoutFunction.apply(x, keep, LEVELS / (LEVELS - self.n_dropped_levels))
        return y
