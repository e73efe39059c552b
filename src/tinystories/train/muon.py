"""Muon: momentum whose update of a matrix has all its singular values near one.

Our own because `torch.optim.Muon` computes in bf16, which a CPU without native bf16 emulates slowly, and takes one
matrix at a time (docs/log.md has the times).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# One quintic (a, b, c) for each iteration: Polar Express (Amsel et al. 2025, arXiv 2505.16932), the greedy best three
# for singular values from 0.01. Five for values from 0.001 train no better (docs/log.md). The inputs are taken a
# hundredth smaller, so that rounding never leaves the safe range.
POLAR_EXPRESS = ((8.094, -23.623, 17.448), (3.638, -2.723, 0.537), (2.663, -1.979, 0.453))
SAFETY_FACTOR = 1.01
EPSILON = 1e-7

Quintics = Sequence[tuple[float, float, float]]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with decoupled decay.

    A matrix (outer, inner) moves by lr * sqrt(max(1, outer / inner)) in its largest directions, so that one learning
    rate serves matrices of all widths. With `beta2` its rows take steps of one size: each is divided by the root of a
    running mean of its squares, and the whole keeps its norm (NorMuon, Li et al. 2025, arXiv 2510.05491).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
        quintics: Quintics = POLAR_EXPRESS,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__(list(params), settings | {"quintics": quintics})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop makes its gradients itself"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[tuple(weight.shape)].append(weight)
            for (outer, inner), weights in by_shape.items():
                self.update_weights(weights, group, group["lr"] * max(1.0, outer / inner) ** 0.5)

    def update_weights(self, weights: list[Tensor], group: dict[str, Any], lr: float) -> None:
        """Move matrices of one shape together: their products are batched."""
        directions = []
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None, "only weights with gradients come here"
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            if group["beta2"] and "row_squares" not in state:  # nor has a run that began without even rows
                state["row_squares"] = weight.new_zeros(weight.shape[0])
            momentum_buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(torch.lerp(gradient, momentum_buffer, group["momentum"]))
        updates = orthogonalized(torch.stack(directions), group["quintics"])
        if group["beta2"]:
            row_mean_squares = updates.square().mean(dim=2)
            running_mean_squares = [self.state[weight]["row_squares"] for weight in weights]
            torch._foreach_lerp_(running_mean_squares, list(row_mean_squares), 1 - group["beta2"])
            updates = normalize_rows(updates, torch.stack(running_mean_squares))
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)


def normalize_rows(
    updates: Float[Tensor, "n outer inner"], mean_squares: Float[Tensor, "n outer"]
) -> Float[Tensor, "n outer inner"]:
    """Each row divided by the root of its mean of squares, each matrix brought back to the norm it had."""
    normalized = updates / (mean_squares.sqrt() + EPSILON)[..., None]
    norms = [matrices.norm(dim=(1, 2), keepdim=True) for matrices in (updates, normalized)]
    return normalized * (norms[0] / norms[1].clamp(min=EPSILON))


def orthogonalized(
    matrices: Float[Tensor, "n outer inner"], quintics: Quintics = POLAR_EXPRESS
) -> Float[Tensor, "n outer inner"]:
    """Near U V^T of each matrix U S V^T, by one iteration x -> a x + (b x x^T + c (x x^T)^2) x for each (a, b, c).

    Singular values end in about 0.7 to 1.3, those below a hundredth of the norm of all in less. In bf16 on CUDA, which
    is precise enough; in the given dtype elsewhere.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    if matrices.device.type == "cuda":
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY_FACTOR + EPSILON)
    for a, b, c in quintics:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
