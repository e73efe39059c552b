"""Cross-entropy fused with the vocabulary head, for training on a CPU: the softmax is computed in small tiles."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories.model.loss import IGNORE_INDEX, prepare_rows

# Logits of one chunk, at most: its rows share one matmul, which adds once to the gradient of the whole head.
CHUNK_LOGITS = 2**24
MIN_CHUNK_ROWS = 512
# Logits of one tile, at most: the softmax reads and writes them several times, so they should stay in a cache.
TILE_LOGITS = 2**19
MIN_TILE_ROWS = 16


class TiledLinearCrossEntropy(torch.autograd.Function):
    """`FusedLinearCrossEntropy` with two sizes: chunks of rows for the matmuls, tiles of a chunk for the softmax.

    All buffers are allocated once. In bf16 a chunk of logits is bf16 and only one tile of it is fp32 at any time.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Float[Tensor, "N C"],
        weight: Float[Tensor, "V C"],
        targets: Int[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        n_rows, vocab_size = hidden.shape[0], weight.shape[0]
        chunk_rows = min(n_rows, max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size))
        tile_rows = min(chunk_rows, max(MIN_TILE_ROWS, TILE_LOGITS // vocab_size))
        is_fp32 = hidden.dtype == torch.float32
        weight_cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        loss_sum = torch.zeros(())
        logits = hidden.new_empty((chunk_rows, vocab_size))
        # Needed in bf16 only: a tile in fp32, and the product that a chunk adds to the gradient of the head.
        fp32_tile = None if is_fp32 else torch.empty((tile_rows, vocab_size))
        chunk_grad_weight = None if is_fp32 else torch.empty_like(weight_cast)
        for start in range(0, n_rows, chunk_rows):
            h, y = hidden[start : start + chunk_rows], targets[start : start + chunk_rows, None]
            target_mask = (y != IGNORE_INDEX).float()
            y = y.clamp(min=0)
            z = torch.mm(h, weight_cast.t(), out=logits[: h.shape[0]])
            for tile in range(0, h.shape[0], tile_rows):
                rows = slice(tile, tile + tile_rows)
                z_tile = z[rows]
                p = z_tile if fp32_tile is None else fp32_tile[: z_tile.shape[0]].copy_(z_tile)
                loss_sum += softmax_minus_one_hot_(p, y[rows], target_mask[rows])
                if fp32_tile is not None:
                    z_tile.copy_(p)
            torch.mm(z, weight_cast, out=grad_hidden[start : start + chunk_rows])
            if chunk_grad_weight is None:
                grad_weight.addmm_(z.t(), h)
            else:
                grad_weight += torch.mm(z.t(), h, out=chunk_grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


def softmax_minus_one_hot_(
    z: Float[Tensor, "n V"], y: Int[Tensor, "n 1"], target_mask: Float[Tensor, "n 1"]
) -> Float[Tensor, ""]:
    """Replace logits by the gradient of their summed cross-entropy, in place; return the cross-entropy.

    Rows with a `target_mask` of 0 do not count.
    """
    z -= z.amax(dim=1, keepdim=True)
    z_target = z.gather(1, y)
    p = z.exp_()
    p_sum = p.sum(dim=1, keepdim=True)
    p *= target_mask / p_sum
    p.scatter_add_(1, y, -target_mask)
    return ((p_sum.log() - z_target) * target_mask).sum()


def tiled_linear_cross_entropy(
    hidden: Float[Tensor, "*rest C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "*rest"]
) -> Float[Tensor, ""]:
    """Return what `fused_linear_cross_entropy` returns, up to rounding; on a CPU, with gradients."""
    loss: Tensor = TiledLinearCrossEntropy.apply(*prepare_rows(hidden, weight, targets))
    return loss
