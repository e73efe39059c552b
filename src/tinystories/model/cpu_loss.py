"""Cross-entropy fused with the vocabulary head, for training on a CPU: a kernel computes it row by row."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories import training_kernels
from tinystories.model.loss import prepare_rows
from tinystories.training_kernels import run

# Logits of one chunk, at most: its rows share one matmul, which adds once to the gradient of the whole head.
CHUNK_LOGITS = 2**24
MIN_CHUNK_ROWS = 512


class CPULinearCrossEntropy(torch.autograd.Function):
    """`FusedLinearCrossEntropy` for a CPU. All buffers are allocated once; in bf16 no logits are stored as fp32."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Float[Tensor, "N C"],
        weight: Float[Tensor, "V C"],
        targets: Int[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        n_rows, vocab_size = hidden.shape[0], weight.shape[0]
        chunk_rows = min(n_rows, max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size))
        is_fp32 = hidden.dtype == torch.float32
        weight_cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        losses = torch.empty(n_rows)
        logits = hidden.new_empty((chunk_rows, vocab_size))
        # Needed in bf16 only: the product that a chunk adds to the gradient of the head.
        chunk_grad_weight = None if is_fp32 else torch.empty_like(weight_cast)
        for start in range(0, n_rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h = hidden[chunk]
            z = torch.mm(h, weight_cast.t(), out=logits[: h.shape[0]])
            run(
                training_kernels.cross_entropy, z, targets[chunk], losses[chunk]
            )  # z turns into the gradient of the logits
            torch.mm(z, weight_cast, out=grad_hidden[chunk])
            if chunk_grad_weight is None:
                grad_weight.addmm_(z.t(), h)
            else:
                grad_weight += torch.mm(z.t(), h, out=chunk_grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


def cpu_linear_cross_entropy(
    hidden: Float[Tensor, "*rest C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "*rest"]
) -> Float[Tensor, ""]:
    """Return what `fused_linear_cross_entropy` returns, up to rounding; on a CPU, with gradients."""
    loss: Tensor = CPULinearCrossEntropy.apply(*prepare_rows(hidden, weight, targets))
    return loss
