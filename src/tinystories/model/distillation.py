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

# A chunk needs this many buffers of the size of its logits, where the loss without teachers needs one.
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
        vocab_size = weight.shape[0]
        rows = max(1, chunk_rows(vocab_size, hidden.device.type) // N_CHUNK_BUFFERS)
        weight_cast = weight.to(hidden.dtype)
        teachers = [Head(head.hidden, head.weight.to(head.hidden.dtype)) for head in teachers]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        cross_entropy = torch.zeros((), device=hidden.device)
        divergence = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            h, y = hidden[chunk], targets[chunk, None]
            target_mask = (y != IGNORE_INDEX).float()
            y = y.clamp(min=0)
            z = (h @ weight_cast.t()).float()
            log_p = z.log_softmax(1)
            cross_entropy -= (log_p.gather(1, y) * target_mask).sum()
            softened_log_p = log_p if temperature == 1 else (z / temperature).log_softmax(1)
            teacher_p = average_probabilities([Head(t.hidden[chunk], t.weight) for t in teachers], temperature)
            # KL(teacher || student) = sum of t log t - t log p; xlogy is 0 where t underflows to 0.
            terms = torch.xlogy(teacher_p, teacher_p).addcmul_(teacher_p, softened_log_p, value=-1)
            divergence += (terms.sum(1, keepdim=True) * target_mask).sum()
            # The gradient of temperature^2 * KL by the logits is temperature * (p - t).
            grad_z = (softened_log_p.exp() - teacher_p).mul_(kl_weight * temperature).add_(log_p.exp_())
            grad_z.mul_(target_mask).scatter_add_(1, y, -target_mask)
            grad_z = grad_z.to(hidden.dtype)
            torch.mm(grad_z, weight_cast, out=grad_hidden[chunk])
            grad_weight += grad_z.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy + kl_weight * temperature**2 * divergence, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Float[Tensor, ""], _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def average_probabilities(teachers: Sequence[Head], temperature: float) -> Float[Tensor, "N V"]:
    """Return the mean over the teachers of softmax(logits / temperature)."""
    total = None
    for hidden, weight in teachers:
        p = (hidden @ weight.t()).float().div_(temperature).softmax(1)
        total = p if total is None else total.add_(p)
    assert total is not None, "at least one teacher"
    return total if len(teachers) == 1 else total.div_(len(teachers))


class DistillationObjective(nn.Module):
    """`Objective` with teachers: models with the same vocabulary, in eval mode, on the device of the student."""

    def __init__(self, model: GPT, teachers: Sequence[GPT], kl_weight: float, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.teachers = tuple(teachers)  # not submodules: they are neither trained nor saved
        self.kl_weight, self.temperature = kl_weight, temperature

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
                *LinearDistillation.apply(rows, weight, flat_targets, heads, self.kl_weight, self.temperature)
            )
