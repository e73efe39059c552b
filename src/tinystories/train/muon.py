"""Muon: momentum whose update of a matrix has all its singular values near one.

Our own because `torch.optim.Muon` computes in bf16, which a CPU without native bf16 emulates slowly, and takes one
matrix at a time (docs/log.md has the times).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; Keller Jordan's, steepest at zero
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with decoupled decay.

    A matrix (outer, inner) moves by lr * sqrt(max(1, outer / inner)) in its largest directions, so that one learning
    rate serves matrices of all widths.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the loop makes its gradients itself"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[tuple(weight.shape)].append(weight)
            for (outer, inner), weights in by_shape.items():
                self.update(weights, group, group["lr"] * max(1.0, outer / inner) ** 0.5)

    def update(self, weights: list[Tensor], group: dict[str, Any], rate: float) -> None:
        """Move matrices of one shape together: their products are batched."""
        directions = []
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            assert gradient is not None, "only weights with gradients come here"
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(torch.lerp(gradient, mean, group["momentum"]))
        updates = orthogonalized(torch.stack(directions), group["steps"])
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalized(matrices: Float[Tensor, "n outer inner"], steps: int) -> Float[Tensor, "n outer inner"]:
    """Near U V^T of each matrix U S V^T, by Newton-Schulz iterations; singular values end in about 0.7 to 1.2.

    In bf16 on CUDA, which is precise enough; in the given dtype elsewhere.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    if matrices.device.type == "cuda":
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
