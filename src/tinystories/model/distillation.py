"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531): cross-entropy plus KL divergence to teachers.

Letters in shapes: N rows of hidden states, C = n_embd of the student, V vocab.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tinystories.model.gpt import GPT
from tinystories.model.loss import IGNORE_INDEX, chunk_rows, prepare_rows

# On a CPU: logits of one chunk, at most. Its rows share one matmul, which adds once to the gradient of the whole head.
CHUNK_LOGITS = 2**24
MIN_CHUNK_ROWS = 512
# On a CPU: logits of one tile, at most. The softmax reads and writes them several times: they should stay in a cache.
TILE_LOGITS = 2**19
MIN_TILE_ROWS = 16

# A chunk on CUDA needs this many buffers of the size of its logits, where the loss without teachers needs one.
N_CHUNK_BUFFERS = 4


class Head(NamedTuple):
    """The inputs of a teacher's head: hidden states (N, C of the teacher) and weight (V, C of the teacher)."""

    hidden: Tensor
    weight: Tensor


class DistillationLoss(NamedTuple):
    """Sums over all targets, in nats. `total` is cross_entropy + weight * temperature^2 * KL divergence."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]  # without a gradient


class LinearDistillation(torch.autograd.Function):
    """`DistillationLoss` of the student's head, chunk by chunk, like `FusedLinearCrossEntropy`."""

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
        n_rows, vocab_size = hidden.shape[0], weight.shape[0]
        chunk_size, tile_size = split_rows(vocab_size, hidden.device.type)
        weight_cast = weight.to(hidden.dtype)
        teachers = [Head(head.hidden, head.weight.to(head.hidden.dtype)) for head in teachers]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        cross_entropy = torch.zeros((), device=hidden.device)
        divergence = torch.zeros((), device=hidden.device)
        for start in range(0, n_rows, chunk_size):
            chunk = slice(start, min(start + chunk_size, n_rows))
            h = hidden[chunk]
            z = h @ weight_cast.t()
            for tile_start in range(chunk.start, chunk.stop, tile_size):
                tile = slice(tile_start, min(tile_start + tile_size, chunk.stop))
                z_tile = z[tile.start - start : tile.stop - start]
                y = targets[tile, None]
                target_mask = (y != IGNORE_INDEX).float()
                y = y.clamp(min=0)
                log_p = z_tile.float().log_softmax(1)
                cross_entropy -= (log_p.gather(1, y) * target_mask).sum()
                softened_log_p = log_p if temperature == 1 else (z_tile.float() / temperature).log_softmax(1)
                teacher_p, teacher_entropy = average_probabilities(
                    [Head(teacher.hidden[tile], teacher.weight) for teacher in teachers], temperature
                )
                # KL(teacher || student) = sum of t log t - t log p.
                teacher_cross_entropy = -(teacher_p * softened_log_p).sum(1, keepdim=True)
                divergence += ((teacher_cross_entropy - teacher_entropy) * target_mask).sum()
                # The gradient of temperature^2 * KL by the logits is temperature * (p - t).
                softened_p = softened_log_p.exp()
                p = softened_p.clone() if temperature == 1 else log_p.exp_()
                grad_z = softened_p.sub_(teacher_p).mul_(kl_weight * temperature).add_(p)
                grad_z.mul_(target_mask).scatter_add_(1, y, -target_mask)
                z_tile.copy_(grad_z)  # in place, z turns from logits into their gradient
            torch.mm(z, weight_cast, out=grad_hidden[chunk])
            grad_weight += z.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + kl_weight * temperature**2 * divergence, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""], _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def split_rows(vocab_size: int, device: str) -> tuple[int, int]:
    """Return how many rows make up a chunk, which shares its matmuls, and a tile, which shares the rest.

    On a CPU a tile should stay in a cache, since it is read and written several times. On CUDA a tile is a chunk.
    """
    if device == "cpu":
        return max(MIN_CHUNK_ROWS, CHUNK_LOGITS // vocab_size), max(MIN_TILE_ROWS, TILE_LOGITS // vocab_size)
    rows = max(1, chunk_rows(vocab_size, device) // N_CHUNK_BUFFERS)
    return rows, rows


def average_probabilities(
    teachers: Sequence[Head], temperature: float
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N 1"]]:
    """Return the mean over the teachers of softmax(logits / temperature), and its entropies in nats."""
    log_p = [(hidden @ weight.t()).float().div_(temperature).log_softmax(1) for hidden, weight in teachers]
    if len(log_p) == 1:
        p = log_p[0].exp()
        return p, -(p * log_p[0]).sum(1, keepdim=True)
    p = torch.stack(log_p).exp_().mean(0)
    return p, -torch.xlogy(p, p).sum(1, keepdim=True)


class DistillationObjective(nn.Module):
    """`Objective` with teachers: models with the same vocabulary, without dropout, on the device of the student."""

    def __init__(
        self,
        model: GPT,
        teachers: Sequence[GPT],
        kl_weight: float,
        temperature: float,
        linear_distillation: type[torch.autograd.Function] = LinearDistillation,
    ) -> None:
        super().__init__()
        self.model = model
        self.teachers = tuple(teachers)  # not submodules: they are neither trained nor saved
        self.kl_weight, self.temperature, self.linear_distillation = kl_weight, temperature, linear_distillation

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> DistillationLoss:
        """Return the loss, summed over the targets; positions with IGNORE_INDEX are excluded."""
        with torch.no_grad():
            hiddens = [teacher(inputs) for teacher in self.teachers]
        return self.compute_loss(self.model(inputs), targets, hiddens)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute_loss(self, hidden: Tensor, targets: Tensor, teacher_hiddens: list[Tensor]) -> DistillationLoss:
        heads = []
        with torch.no_grad():
            for teacher, teacher_hidden in zip(self.teachers, teacher_hiddens, strict=True):
                rows, weight, _ = prepare_rows(teacher_hidden, teacher.lm_head.weight, targets)
                heads.append(Head(rows, weight))
        rows, weight, flat_targets = prepare_rows(hidden, self.model.lm_head.weight, targets)
        with torch.autocast(hidden.device.type, enabled=False):
            return DistillationLoss(
                *self.linear_distillation.apply(rows, weight, flat_targets, heads, self.kl_weight, self.temperature)
            )
