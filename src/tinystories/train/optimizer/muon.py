"""The Muon optimizer: momentum, orthogonalized so that all singular values of a matrix's update are close to one.

Used instead of `torch.optim.Muon`, which computes in bf16 (slow on CPUs without native bf16) and updates one matrix at
a time; docs/log.md has timings.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tinystories.train.optimizer.muon_kernels import apply_update, update_momentum
from tinystories.training_kernels import f32, run_each

# Coefficients (a, b, c) of one quintic polynomial per iteration: Polar Express (Amsel et al. 2025, arXiv 2505.16932),
# the greedily optimal three for singular values from 0.01. Five, for values from 0.001, train no better (docs/log.md).
# SAFETY_FACTOR shrinks the input by 1%, so that rounding never moves a singular value out of that range.
POLAR_EXPRESS = ((8.094, -23.623, 17.448), (3.638, -2.723, 0.537), (2.663, -1.979, 0.453))
SAFETY_FACTOR = 1.01
EPSILON = 1e-7

Quintics = Sequence[tuple[float, float, float]]


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum with decoupled weight decay; for 2-D weights only.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. The singular values of an (outer, inner) matrix's
    update are about lr * sqrt(max(1, outer / inner)), so that one learning rate works for matrices of all shapes. With
    `cpu_kernels` it orthogonalizes in bf16 on a CPU, and uses Numba kernels for the rest. With
    `beta2` > 0 the steps of its rows are equalized: each row of the update is divided by the root of a running mean of
    its squares, and the matrix is rescaled to keep its norm (NorMuon, Li et al. 2025, arXiv 2510.05491).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
        quintics: Quintics = POLAR_EXPRESS,
        cpu_kernels: bool = False,
    ) -> None:
        self.cpu_kernels = cpu_kernels
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__(list(params), settings | {"quintics": quintics})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient. `closure` is not supported."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[tuple(weight.shape)].append(weight)
            for (outer, inner), weights in by_shape.items():
                self.update_weights(weights, group, group["lr"] * max(1.0, outer / inner) ** 0.5)

    def update_weights(self, weights: list[Tensor], group: dict[str, Any], lr: float) -> None:
        """Update matrices of equal shape together, with batched matmuls. `lr` includes the factor for the shape."""
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            # Separate from the above: a run that is resumed with beta2 may have started without it.
            if group["beta2"] and "row_squares" not in state:
                state["row_squares"] = weight.new_zeros(weight.shape[0])
        if self.cpu_kernels:
            self.update_weights_by_kernels(weights, group, lr)
            return
        directions = []
        for weight in weights:
            gradient = weight.grad
            assert gradient is not None, "step passes only weights with gradients"
            momentum_buffer = self.state[weight]["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(torch.lerp(gradient, momentum_buffer, group["momentum"]))
        updates = orthogonalized(torch.stack(directions), group["quintics"])
        if group["beta2"]:
            row_mean_squares = updates.square().mean(dim=2)
            running_mean_squares = [self.state[weight]["row_squares"] for weight in weights]
            torch._foreach_lerp_(running_mean_squares, list(row_mean_squares), 1 - group["beta2"])
            updates = normalize_rows(updates, torch.stack(running_mean_squares))
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)

    def update_weights_by_kernels(self, weights: list[Tensor], group: dict[str, Any], lr: float) -> None:
        """Do what `update_weights` does, with Numba kernels and matmuls in bf16."""
        x = weights[0].new_empty((len(weights), *weights[0].shape), dtype=torch.bfloat16)
        states = [self.state[weight] for weight in weights]
        buffers = [state["momentum_buffer"] for state in states]
        row_squares = [state.get("row_squares", buffer[:, 0]) for state, buffer in zip(states, buffers, strict=True)]
        momentum, beta2, decay, rate = (
            f32(number) for number in (group["momentum"], group["beta2"], 1 - group["lr"] * group["weight_decay"], lr)
        )
        shrinking, epsilon = f32(SAFETY_FACTOR), f32(EPSILON)
        run_each(
            update_momentum,
            [(weights[i].grad, buffers[i], momentum, shrinking, epsilon, x[i]) for i in range(len(weights))],
        )
        updates = iterate_quintics(x, group["quintics"])
        run_each(
            apply_update,
            [(updates[i], row_squares[i], beta2, epsilon, decay, rate, weights[i]) for i in range(len(weights))],
        )


def normalize_rows(
    updates: Float[Tensor, "n outer inner"], mean_squares: Float[Tensor, "n outer"]
) -> Float[Tensor, "n outer inner"]:
    """Divide each row by the root of its mean square, then rescale each matrix to its original norm."""
    normalized = updates / (mean_squares.sqrt() + EPSILON)[..., None]
    norms = [matrices.norm(dim=(1, 2), keepdim=True) for matrices in (updates, normalized)]
    return normalized * (norms[0] / norms[1].clamp(min=EPSILON))


def orthogonalized(
    matrices: Float[Tensor, "n outer inner"], quintics: Quintics = POLAR_EXPRESS
) -> Float[Tensor, "n outer inner"]:
    """Return approximately U V^T for each matrix with singular value decomposition U S V^T.

    The resulting singular values are about 0.7 to 1.3, except that those below 1% of the Frobenius norm end up smaller.
    Computes in bf16 on CUDA, which is precise enough, and in the input's dtype otherwise; returns the input's dtype.
    """
    # Iterate on the wide orientation: its Gram matrix x x^T is the smaller one.
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    if matrices.device.type == "cuda":
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) * SAFETY_FACTOR + EPSILON)
    x = iterate_quintics(x, quintics)
    return (x.mT if tall else x).to(matrices.dtype)


def iterate_quintics(
    x: Float[Tensor, "n outer inner"], quintics: Quintics = POLAR_EXPRESS
) -> Float[Tensor, "n outer inner"]:
    """Return x -> a x + (b x x^T + c (x x^T)^2) x for each (a, b, c) in `quintics`, for matrices of a norm below 1.

    Tall matrices stay tall, and are multiplied from the right: no matrix is copied to be transposed.
    """
    tall = x.shape[1] > x.shape[2]
    for a, b, c in quintics:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x
