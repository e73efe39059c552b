"""The training objective: cross-entropy fused with the vocabulary head, which never materializes all logits."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinystories.model.gpt import GPT

# Target of padding: excluded from the loss.
IGNORE_INDEX = -100
# Size of one chunk of logits on a CPU: fits its caches, and stays below glibc's limit for a fresh mmap per allocation.
CHUNK_BYTES = 30 * 2**20
# At least this many rows: each chunk adds once to the gradient of the whole head.
MIN_CHUNK_ROWS = 512
# Size of one chunk of logits on CUDA: its matmuls need thousands of rows to be efficient.
CUDA_CHUNK_BYTES = 2**31
# Logits are padded to a multiple of this many columns: tensor cores are slow on rows that are not aligned.
ALIGNMENT = 64


def chunk_rows(vocab_size: int, device: str) -> int:
    """Return how many rows of fp32 logits make up one chunk on a device type ("cpu", "cuda").

    A power of two on CUDA, so that the chunks of a batch tend to have the same size.
    """
    if device == "cuda":
        return 1 << max(0, (CUDA_CHUNK_BYTES // (4 * vocab_size)).bit_length() - 1)
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size))


def vocab_padding(vocab_size: int, device: str) -> int:
    """Return the number of padding columns of the logits: nonzero only on CUDA. They do not contribute to the loss."""
    return -vocab_size % ALIGNMENT if device == "cuda" else 0


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target] over rows whose target is not IGNORE_INDEX.

    The rows are processed in chunks. The forward pass also computes the gradients, while it holds the probabilities of
    a chunk (softmax minus one-hot); the backward pass only scales them. Softmax and sums are fp32 for any input dtype.
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
        # One buffer for all chunks: fresh memory is slow.
        logits = hidden.new_empty((rows, weight_cast.shape[0]), dtype=torch.float32)
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
            # In place, z turns from logits into exp(z - max), then into probabilities, then into their gradient.
            z -= z.amax(dim=1, keepdim=True)
            z_target = z.gather(1, y)
            p = z.exp_()
            p_sum = p.sum(dim=1, keepdim=True)
            loss_sum += ((p_sum.log() - z_target) * target_mask).sum()
            if needs_grad:
                p *= target_mask / p_sum
                # Subtract the one-hot targets. Compilers fuse a comparison into its neighbors, but not a scatter.
                if compiling:
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
    """Return the cross-entropy in nats, summed over all targets that are not IGNORE_INDEX.

    Under autocast the matmuls use its dtype.
    """
    loss: Tensor = FusedLinearCrossEntropy.apply(*prepare_rows(hidden, weight, targets))
    return loss


def prepare_rows(
    hidden: Float[Tensor, "*rest C"], weight: Float[Tensor, "V C"], targets: Int[Tensor, "*rest"]
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "V C"], Int[Tensor, " N"]]:
    """Return the arguments as rows; `hidden` in autocast's dtype, and without gradients where they are disabled."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if not torch.is_grad_enabled():  # inside a Function, needs_input_grad ignores it
        hidden, weight = hidden.detach(), weight.detach()
    return hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)


class Objective(nn.Module):
    """The function that training minimizes. torch.compile and DDP wrap this module, not the model that is saved."""

    def __init__(self, model: GPT, linear_cross_entropy: Callable[..., Tensor] = fused_linear_cross_entropy) -> None:
        """`linear_cross_entropy` has the signature of `fused_linear_cross_entropy`."""
        super().__init__()
        self.model, self.linear_cross_entropy = model, linear_cross_entropy

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Return the cross-entropy of the targets in nats, summed; positions with IGNORE_INDEX are excluded."""
        return self.linear_cross_entropy(self.model(inputs), self.model.lm_head.weight, targets)
