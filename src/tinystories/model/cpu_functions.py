"""Parts of a transformer block that `training_kernels` computes in training on a CPU, with their gradients.

Letters in shapes: B batch, T tokens, H heads, D = head_dim, E = 3 H D, C = n_embd, F = n_ff.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories import training_kernels
from tinystories.training_kernels import N_PARTS, f32, run


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm of x, fp32 or bf16, computed in fp32 and returned as `dtype`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Float[Tensor, "*rest C"], weight: Float[Tensor, " C"], eps: float, dtype: torch.dtype
    ) -> Float[Tensor, "*rest C"]:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows, dtype=dtype)
        inv_rms = torch.empty(rows.shape[0])
        run(training_kernels.rms_norm, rows, weight, f32(eps), y, inv_rms)
        ctx.save_for_backward(rows, weight, inv_rms)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Float[Tensor, "*rest C"]
    ) -> tuple[Float[Tensor, "*rest C"], Float[Tensor, " C"], None, None]:
        rows, weight, inv_rms = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros(N_PARTS, rows.shape[1])
        run(training_kernels.rms_norm_backward, grad.reshape(rows.shape), rows, weight, inv_rms, grad_rows, grad_weight)
        return grad_rows.view(grad.shape), grad_weight.sum(0), None, None


class SplitHeadsFunction(torch.autograd.Function):
    """Queries and keys, normed and rotated, and values, each (B, H, T, D), from their joint projection."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        qkv: Float[Tensor, "B T E"],
        q_weight: Float[Tensor, " D"],
        k_weight: Float[Tensor, " D"],
        eps: float,
        cos: Float[Tensor, "T D"],
        sin: Float[Tensor, "T D"],
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        n_batch, n_tokens, _ = qkv.shape
        qkv = qkv.view(n_batch, n_tokens, 3, -1, len(q_weight))
        n_heads, size = qkv.shape[3:]
        q, k, v = (qkv.new_empty((n_batch, n_heads, n_tokens, size)) for _ in range(3))
        inv_rms = torch.empty(n_batch, n_tokens, 2, n_heads)
        run(training_kernels.split_heads, qkv, q_weight, k_weight, f32(eps), cos, sin, q, k, v, inv_rms)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, inv_rms)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        grad_q: Float[Tensor, "B H T D"],
        grad_k: Float[Tensor, "B H T D"],
        grad_v: Float[Tensor, "B H T D"],
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        qkv = saved[0]
        grad_qkv = torch.empty_like(qkv)
        grad_weights = torch.zeros(N_PARTS, 2, qkv.shape[-1])
        grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
        run(training_kernels.split_heads_backward, *grads, *saved, grad_qkv, grad_weights)
        return grad_qkv.flatten(2), *grad_weights.sum(0), None, None, None


class GatedSiLUFunction(torch.autograd.Function):
    """silu(gate) * up; saves only its inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Float[Tensor, "*rest F"], up: Float[Tensor, "*rest F"]) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        run(training_kernels.gated_silu, *(value.view(-1, value.shape[-1]) for value in (gate, up, y)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "*rest F"]) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        grads = torch.empty_like(gate), torch.empty_like(up)
        run(
            training_kernels.gated_silu_backward,
            *(value.view(-1, value.shape[-1]) for value in (grad, gate, up, *grads)),
        )
        return grads


def rms_norm(
    x: Float[Tensor, "*rest C"], weight: Float[Tensor, " C"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*rest C"]:
    """Return RMSNorm of x, fp32 or bf16, over the last axis as `dtype`."""
    y: Tensor = RMSNormFunction.apply(x, weight, eps, dtype)
    return y


def split_heads(
    qkv: Float[Tensor, "B T E"],
    q_weight: Float[Tensor, " D"],
    k_weight: Float[Tensor, " D"],
    eps: float,
    cos: Float[Tensor, "T D"],
    sin: Float[Tensor, "T D"],
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
    """Return queries, keys and values: RMSNorm and `apply_rope` of the first two, all contiguous."""
    q, k, v = SplitHeadsFunction.apply(qkv, q_weight, k_weight, eps, cos, sin)
    return q, k, v


def gated_silu(gate: Float[Tensor, "*rest F"], up: Float[Tensor, "*rest F"]) -> Float[Tensor, "*rest F"]:
    """Return silu(gate) * up, the gated activation of SwiGLU. Both are contiguous and have one dtype."""
    y: Tensor = GatedSiLUFunction.apply(gate, up)
    return y
