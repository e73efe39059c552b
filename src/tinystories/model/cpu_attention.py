"""Causal attention for training on a CPU, where it is faster than `F.scaled_dot_product_attention`.

Each row of the batch is computed by batched matmuls over its heads, whose operands fit the CPU's caches, and by kernels
that skip what the mask excludes. The attention
probabilities are recomputed in the backward pass, so nothing of size T x T is stored.

Letters in shapes: B batch, T tokens, H heads, D = head_dim, L keys that a block of queries may see.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories import training_kernels
from tinystories.training_kernels import f32, run

# From this many tokens on, queries are processed in two blocks: the first one skips the second half of the keys, which
# is a quarter of the arithmetic. In shorter rows the smaller matmuls would cost more than that.
MIN_TOKENS_FOR_TWO_BLOCKS = 512


class CausalAttentionFunction(torch.autograd.Function):
    """softmax(scale * q k^T + causal mask) v, row by row. Scores have the dtype of q; softmax sums in fp32.

    The output is laid out as (B, T, H, D), which the output projection reads.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        scale: float,
    ) -> Float[Tensor, "B H T D"]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        n_batch, n_heads, n_tokens, size = q.shape
        y = q.new_empty((n_batch, n_tokens, n_heads, size)).transpose(1, 2)
        for row in range(n_batch):
            for start, stop in query_blocks(n_tokens):
                p = probabilities(q[row, :, start:stop], k[row, :, :stop], scale, start)
                y[row, :, start:stop] = torch.bmm(p, v[row, :, :stop])
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, "B H T D"]) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        n_tokens = q.shape[2]
        for row in range(q.shape[0]):
            # The last block comes first: it sees all keys, so it initializes all of their gradients.
            for start, stop in reversed(list(query_blocks(n_tokens))):
                block_q, block_grad = q[row, :, start:stop], grad[row, :, start:stop]
                seen_k, seen_v = k[row, :, :stop], v[row, :, :stop]
                p = probabilities(block_q, seen_k, scale, start)
                grad_scores = torch.bmm(block_grad, seen_v.mT)  # of the probabilities, for now
                run(training_kernels.causal_softmax_backward, p, grad_scores, f32(scale), start)
                grad_q[row, :, start:stop] = torch.bmm(grad_scores, seen_k)
                if stop == n_tokens:
                    grad_k[row] = torch.bmm(grad_scores.mT, block_q)
                    grad_v[row] = torch.bmm(p.mT, block_grad)
                else:
                    grad_k[row, :, :stop] += torch.bmm(grad_scores.mT, block_q)
                    grad_v[row, :, :stop] += torch.bmm(p.mT, block_grad)
        return grad_q, grad_k, grad_v, None


def query_blocks(n_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each block of queries; its queries see the keys 0 .. stop-1."""
    size = n_tokens if n_tokens < MIN_TOKENS_FOR_TWO_BLOCKS else -(-n_tokens // 2)
    for start in range(0, n_tokens, size):
        yield start, min(start + size, n_tokens)


def probabilities(
    q: Float[Tensor, "H t D"], k: Float[Tensor, "H L D"], scale: float, start: int
) -> Float[Tensor, "H t L"]:
    """Return the attention probabilities of a block of queries of one row, whose first one has `start` before it."""
    scores = torch.bmm(q, k.mT)
    run(training_kernels.causal_softmax, scores, f32(scale), start)
    return scores


def causal_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    scale: float | None = None,
) -> Float[Tensor, "B H T D"]:
    """Return causal attention of q, k and v, which have one dtype. `scale` None: 1/sqrt(D)."""
    y: Tensor = CausalAttentionFunction.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return y
