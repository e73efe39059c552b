"""The losses fused with the vocabulary head, for training on a CPU: kernels compute them row by row."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories import loss_kernels
from tinystories.model.distillation import Head
from tinystories.model.loss import prepare_rows
from tinystories.training_kernels import run

# Logits of one chunk, at most: its rows share one matmul, which adds once to the gradient of the whole head.
CHUNK_LOGITS = 2**24
MIN_CHUNK_ROWS = 512
# Logits of one tile of a teacher, at most: they should stay in a cache until they are read.
TILE_LOGITS = 2**20
MIN_TILE_ROWS = 64


class CPULinearCrossEntropy(torch.autograd.Function):
    """`FusedLinearCrossEntropy` for a CPU. All buffers are allocated once; in bf16 no logits are stored as fp32."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Float[Tensor, "N C"],
        weight: Float[Tensor, "V C"],
        targets: Int[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        losses = torch.empty(len(targets))

        def differentiate(logits: Tensor, chunk: slice) -> None:
            run(loss_kernels.cross_entropy, logits, targets[chunk], losses[chunk])

        ctx.save_for_backward(*compute_head_gradients(hidden, weight, differentiate))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


class CPULinearDistillation(torch.autograd.Function):
    """`LinearDistillation` for a CPU."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Float[Tensor, "N C"],
        weight: Float[Tensor, "V C"],
        targets: Int[Tensor, " N"],
        teachers: Sequence[Head],
        kl_weight: float,
        temperature: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        n_rows, vocab_size = len(targets), len(weight)
        losses, divergences = torch.empty(2, n_rows)
        teachers = [Head(head.hidden, head.weight.to(head.hidden.dtype)) for head in teachers]
        tile_rows = min(n_rows, max(MIN_TILE_ROWS, TILE_LOGITS // vocab_size))
        teacher_logits = hidden.new_empty(len(teachers) * tile_rows * vocab_size)

        def differentiate(logits: Tensor, chunk: slice) -> None:
            for start in range(chunk.start, chunk.stop, tile_rows):
                tile = slice(start, min(start + tile_rows, chunk.stop))
                teacher_shape = len(teachers), tile.stop - start, vocab_size
                teacher_z = teacher_logits[: math.prod(teacher_shape)].view(teacher_shape)  # contiguous, for the kernel
                for head, z in zip(teachers, teacher_z, strict=True):
                    torch.mm(head.hidden[tile], head.weight.t(), out=z)
                z = logits[start - chunk.start : tile.stop - chunk.start]
                settings = kl_weight, temperature
                run(loss_kernels.distillation, z, teacher_z, targets[tile], *settings, losses[tile], divergences[tile])

        ctx.save_for_backward(*compute_head_gradients(hidden, weight, differentiate))
        cross_entropy = losses.sum()
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + kl_weight * temperature**2 * divergences.sum(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""], _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def compute_head_gradients(
    hidden: Float[Tensor, "N C"], weight: Float[Tensor, "V C"], differentiate: Callable[[Tensor, slice], None]
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "V C"]]:
    """Return the gradients of a loss by the hidden states and by the weight of the head.

    `differentiate` turns the logits of a slice of rows into the gradient of the loss by them, in place.
    """
    n_rows, vocab_size = hidden.shape[0], weight.shape[0]
    chunk_rows = min(n_rows, max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size))
    is_fp32 = hidden.dtype == torch.float32
    weight_cast = weight.to(hidden.dtype)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight)
    logits = hidden.new_empty((chunk_rows, vocab_size))
    # Needed in bf16 only: the product that a chunk adds to the gradient of the head.
    chunk_grad_weight = None if is_fp32 else torch.empty_like(weight_cast)
    for start in range(0, n_rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, n_rows))
        h = hidden[chunk]
        z = torch.mm(h, weight_cast.t(), out=logits[: h.shape[0]])
        differentiate(z, chunk)  # z is their gradient now
        torch.mm(z, weight_cast, out=grad_hidden[chunk])
        if chunk_grad_weight is None:
            grad_weight.addmm_(z.t(), h)
        else:
            grad_weight += torch.mm(z.t(), h, out=chunk_grad_weight)
    return grad_hidden, grad_weight


def cpu_linear_cross_entropy(
    hidden: Float[Tensor, "*rest C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "*rest"]
) -> Float[Tensor, ""]:
    """Return what `fused_linear_cross_entropy` returns, up to rounding; on a CPU, with gradients."""
    loss: Tensor = CPULinearCrossEntropy.apply(*prepare_rows(hidden, weight, targets))
    return loss
