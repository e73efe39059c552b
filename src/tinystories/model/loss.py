"""Cross-entropy of the vocabulary head without ever holding all its logits, and the objective training minimises."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinystories.model.gpt import GPT

IGNORE_INDEX = -100  # a target that costs nothing: padding
CHUNK_BYTES = 30 * 2**20  # logits held at once: what a CPU's caches hold, and glibc does not map anew each time
MIN_CHUNK_ROWS = 512  # at least: the head's gradient is added to once for each chunk
CUDA_CHUNK_BYTES = 2**31  # logits held at once on CUDA: its products want thousands of rows, and are few then
ALIGNMENT = 64  # columns: tensor cores are slow on rows of logits that begin at odd addresses


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of logits held at once, of 4 bytes each; a power of two on CUDA, so that all chunks tend to be of one size.

    `device`: its type.
    """
    if device == "cuda":
        return 1 << max(0, (CUDA_CHUNK_BYTES // (4 * vocab_size)).bit_length() - 1)
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size))


def vocab_padding(vocab_size: int, device: str) -> int:
    """Columns that round the logits up and take no part in the loss (GPT-2's vocabulary is odd). None but on CUDA."""
    return -vocab_size % ALIGNMENT if device == "cuda" else 0


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target] over rows whose target is not IGNORE.

    Rows go through in chunks, and the gradients are made on the way forward, while a chunk's probabilities are at
    hand: the backward pass only scales them. Softmax and sums are fp32 whatever the dtype of `hidden`.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Float[Tensor, "N C"],
        weight: Float[Tensor, "V C"],
        targets: Int[Tensor, " N"],
    ) -> Float[Tensor, ""]:
        needs_grad = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        compiling = torch.compiler.is_compiling()
        vocab_size, device = weight.shape[0], hidden.device.type
        weight_cast = weight.to(hidden.dtype)
        if pad := vocab_padding(vocab_size, device):
            weight_cast = F.pad(weight_cast, (0, 0, 0, pad))
        grad_hidden = torch.empty_like(hidden) if needs_grad else hidden
        grad_weight = weight.new_zeros(weight_cast.shape) if needs_grad else weight
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = min(hidden.shape[0], chunk_rows(vocab_size, device))
        logits = hidden.new_empty((rows, weight_cast.shape[0]), dtype=torch.float32)  # once: fresh memory is slow
        for start in range(0, hidden.shape[0], rows):
            h, y = hidden[start : start + rows], targets[start : start + rows, None]
            target_mask = (y != IGNORE_INDEX).float()
            y = y.clamp(min=0)
            z = logits[: h.shape[0]]
            if h.dtype == z.dtype:
                torch.mm(h, weight_cast.t(), out=z)
            else:
                z.copy_(h @ weight_cast.t())
            if pad:
                z[:, vocab_size:] = -torch.inf
            z -= z.amax(dim=1, keepdim=True)
            z_target = z.gather(1, y)
            p = z.exp_()
            p_sum = p.sum(dim=1, keepdim=True)
            loss_sum += ((p_sum.log() - z_target) * target_mask).sum()
            if needs_grad:
                p *= target_mask / p_sum
                if compiling:  # compilers fuse a comparison with what is around it, and a scatter with nothing
                    p -= target_mask * (torch.arange(p.shape[1], device=p.device) == y)
                else:
                    p.scatter_add_(1, y, -target_mask)
                p = p.to(hidden.dtype)
                torch.mm(p, weight_cast, out=grad_hidden[start : start + rows])
                if grad_weight.dtype == p.dtype:
                    grad_weight.addmm_(p.t(), h)
                else:
                    grad_weight += p.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight[:vocab_size])
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Float[Tensor, ""]) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "*rest C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "*rest"]
) -> Float[Tensor, ""]:
    """Sum of nats over all targets that are not IGNORE; under autocast the products are in its dtype."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if not torch.is_grad_enabled():  # a Function cannot tell, and would make gradients for nothing
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = FusedLinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1))
    return loss


class Objective(nn.Module):
    """What training minimises. Compilers and DDP wrap this, never the model that is saved."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Summed nats of the targets (IGNORE where there is none), given the inputs."""
        return fused_linear_cross_entropy(self.model(inputs), self.model.lm_head.weight, targets)
