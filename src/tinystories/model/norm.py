"""RMSNorm with a hand-written gradient, because PyTorch has no fused CPU kernel for it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class RMSNormFunction(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Float[Tensor, "*rest C"], weight: Float[Tensor, " C"], eps: float
    ) -> Float[Tensor, "*rest C"]:
        inv_rms = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inv_rms)
        return (x * inv_rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Float[Tensor, "*rest C"]
    ) -> tuple[Float[Tensor, "*rest C"], Float[Tensor, " C"], None]:
        x, weight, inv_rms = ctx.saved_tensors  # type: ignore[attr-defined]
        return *rms_norm_backward(grad, x, weight, inv_rms), None


def rms_norm_backward(
    grad: Float[Tensor, "*rest C"],
    x: Float[Tensor, "*rest C"],
    weight: Float[Tensor, " C"],
    inv_rms: Float[Tensor, "*rest 1"],
) -> tuple[Float[Tensor, "*rest C"], Float[Tensor, " C"]]:
    """Return the gradients of x and of the weight."""
    grad_normed = (grad * x).mul_(inv_rms)
    grad_weight = grad_normed.reshape(-1, x.shape[-1]).sum(0)
    # d(1/rms)/dx = -x / (C * rms^3): the part of the gradient that points along x.
    along_x = (grad_normed @ weight)[..., None] * inv_rms.square() / -x.shape[-1]
    return (grad * weight).mul_(inv_rms).addcmul_(x, along_x), grad_weight


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that is faster on a CPU and stays fused for bf16 inputs with an fp32 weight (autocast).

    `training_function` computes it in training, if set: a function of x, weight and eps.
    """

    training_function: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def forward(self, x: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest C"]:
        if self.training and self.training_function is not None:
            return self.training_function(x, self.weight, self.eps or 0.0)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            normed: Tensor = RMSNormFunction.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
