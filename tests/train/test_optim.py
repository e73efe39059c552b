"""Muon's update against its definition, the assignment of weights to optimizers, and saved optimizer state."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tinystories.config import ModelConfig, OptimConfig
from tinystories.model import GPT
from tinystories.train.optimizer.build import build_optimizers, flatten_optimizer_state, load_optimizer_state
from tinystories.train.optimizer.muon import Muon, orthogonalized

RATES = {"learning_rate": 0.01, "muon_rate": 0.02}
JORDAN = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's quintic


def tiny(architecture: str = "modern", tied: bool = True) -> GPT:
    torch.manual_seed(3)
    config = ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        vocab_size=31, n_ctx=8, n_layer=2, n_head=2, n_embd=16, n_ff=24, tied=tied,
    )  # fmt: skip
    return GPT(config)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (1, 16, 40)])
def test_singular_vectors_stay_and_singular_values_become_alike(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -1.5, u.shape[-1]).expand(shape[0], -1)  # largest over smallest: 32
    moved = u.mT @ orthogonalized(u * s[:, None] @ v) @ v.mT
    values = moved.diagonal(dim1=1, dim2=2)
    assert ((values > 0.65) & (values < 1.3)).all()
    torch.testing.assert_close(moved, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_a_matrix_does_not_depend_on_those_it_is_batched_with() -> None:
    torch.manual_seed(2)
    matrices = torch.randn(3, 12, 20)
    together = orthogonalized(matrices)
    alone = torch.cat([orthogonalized(one[None]) for one in matrices])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(orthogonalized(matrices * 1000), together, atol=1e-4, rtol=1e-3)


def test_without_its_additions_the_update_is_that_of_torch_but_for_its_bf16() -> None:
    torch.manual_seed(4)
    start, gradients = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(4)]
    ends = []
    for make in (partial(Muon, beta2=0.0, quintics=[JORDAN] * 5), torch.optim.Muon):
        weight = nn.Parameter(start.clone())
        optimizer = make([weight], lr=0.1, momentum=0.9, weight_decay=0.05)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() < 0.03 * ends[1].norm()


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_has_one_optimizer(architecture: str, tied: bool) -> None:
    model = tiny(architecture, tied)
    adamw, muon = build_optimizers(model, OptimConfig(kind="muon", weight_decay=0.3, **RATES))
    decayed, plain = adamw.param_groups
    names = {id(w): name for name, w in model.named_parameters()}
    assigned = [names[id(w)] for group in (decayed, plain, *muon.param_groups) for w in group["params"]]
    assert sorted(assigned) == sorted(names.values())
    assert {names[id(w)] for w in decayed["params"]} <= {"embed_tokens.weight", "lm_head.weight"}
    assert all(names[id(w)].startswith("layers.") and w.ndim == 2 for w in muon.param_groups[0]["params"])
    assert (decayed["weight_decay"], plain["weight_decay"], muon.param_groups[0]["weight_decay"]) == (0.3, 0.0, 0.3)


def test_adamw_alone_takes_everything_and_decays_matrices_only() -> None:
    model = tiny()
    (adamw,) = build_optimizers(model, OptimConfig(kind="adamw", **RATES))
    decayed, plain = adamw.param_groups
    assert {w.ndim for w in decayed["params"]} == {2}
    assert {w.ndim for w in plain["params"]} == {1}
    assert sum(w.numel() for group in (decayed, plain) for w in group["params"]) == model.config.n_params


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_state_survives_being_saved(kind: str) -> None:
    """A second step is the same whether or not the state was saved and loaded before it."""

    def step(model: GPT, optimizers: object) -> None:
        tokens = torch.arange(16).view(2, 8)
        model.logits(model(tokens)).square().mean().backward()
        for optimizer in optimizers:  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

    config = OptimConfig(kind=kind, **RATES)  # type: ignore[arg-type]
    straight, resumed = tiny(), tiny()
    optimizers = build_optimizers(straight, config)
    step(straight, optimizers)
    resumed.load_state_dict(straight.state_dict())
    others = build_optimizers(resumed, config)
    load_optimizer_state(
        resumed, others, {k: v.clone() for k, v in flatten_optimizer_state(straight, optimizers).items()}
    )
    step(straight, optimizers)
    step(resumed, others)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_one_step_moves_every_singular_direction_by_the_rate() -> None:
    torch.manual_seed(5)
    weight = nn.Parameter(torch.zeros(64, 16))
    optimizer = Muon([weight], lr=0.01, beta2=0.0)
    weight.grad = torch.randn(64, 16)
    optimizer.step()
    moved = torch.linalg.svdvals(weight.detach()) / (0.01 * math.sqrt(64 / 16))
    assert 0.65 < moved.min() <= moved.max() < 1.3


@pytest.mark.parametrize("beta2", [0.0, 0.95])
@pytest.mark.parametrize("shape", [(40, 40), (70, 24), (24, 70)], ids=str)
def test_kernels_for_cpus_do_the_same_up_to_bf16(shape: tuple[int, int], beta2: float) -> None:
    torch.manual_seed(7)
    starts, gradients = torch.randn(3, *shape), torch.randn(4, 3, *shape)
    gradients[:, 1] *= torch.logspace(0, -3, shape[0])[:, None]
    moved, states = {}, {}
    for cpu_kernels in (False, True):
        weights = [nn.Parameter(start.clone()) for start in starts]
        optimizer = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.5, beta2=beta2, cpu_kernels=cpu_kernels)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        moved[cpu_kernels] = torch.stack([weight.detach() for weight in weights]) - starts
        states[cpu_kernels] = [optimizer.state[weight] for weight in weights]
    assert (moved[True] - moved[False]).norm() < 0.02 * moved[False].norm()
    for plain, with_kernels in zip(states[False], states[True], strict=True):
        assert plain.keys() == with_kernels.keys()
        torch.testing.assert_close(with_kernels["momentum_buffer"], plain["momentum_buffer"], atol=1e-6, rtol=1e-5)
        if beta2:
            torch.testing.assert_close(with_kernels["row_squares"], plain["row_squares"], atol=1e-3, rtol=0.05)


def test_kernels_leave_a_weight_with_a_gradient_of_zeros_where_it_is() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = Muon([weight], lr=0.1, cpu_kernels=True)
    weight.grad = torch.zeros(6, 4)
    optimizer.step()
    assert torch.equal(weight, torch.ones(6, 4))


def test_rows_whose_gradients_are_small_for_long_move_as_far_as_the_others() -> None:
    torch.manual_seed(6)
    moved = {}
    for beta2 in (0.0, 0.95):
        weight = nn.Parameter(torch.zeros(48, 16))
        optimizer = Muon([weight], lr=0.01, beta2=beta2)
        for _ in range(20):
            weight.grad = torch.randn(48, 16) * torch.logspace(0, -2, 48)[:, None]
            optimizer.step()
        moved[beta2] = weight.detach()
    spread = {beta2: weight.norm(dim=1).max() / weight.norm(dim=1).min() for beta2, weight in moved.items()}
    assert spread[0.95] < 2 < spread[0.0]
    assert float(moved[0.95].norm()) == pytest.approx(float(moved[0.0].norm()), rel=0.3), (
        "the norm stays about the same"
    )


def test_a_row_without_gradient_stays_where_it_is() -> None:
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = Muon([weight], lr=0.01)
    for gradient in (torch.zeros(6, 4), torch.diag_embed(torch.tensor([1.0, 1, 0, 0, 0, 0]))[:, :4]):
        weight.grad = gradient
        optimizer.step()
    assert weight.isfinite().all()
    torch.testing.assert_close(weight[2:], torch.ones(4, 4))


def test_a_run_that_began_without_even_rows_goes_on_with_them() -> None:
    torch.manual_seed(7)
    weight = nn.Parameter(torch.zeros(6, 4))
    plain, even = Muon([weight], lr=0.01, beta2=0.0), Muon([weight], lr=0.01)
    weight.grad = torch.randn(6, 4)
    plain.step()
    even.load_state_dict({"state": plain.state_dict()["state"], "param_groups": even.state_dict()["param_groups"]})
    even.step()
    assert weight.isfinite().all()
    assert even.state[weight]["row_squares"].shape == (6,)
