"""The loss with teachers: its value, its gradients, and what it ignores."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinystories.config import ModelConfig
from tinystories.model import GPT, cpu_attention, cpu_loss, distillation
from tinystories.model.cpu_loss import CPULinearDistillation
from tinystories.model.cpu_training import use_cpu_teacher_kernels
from tinystories.model.distillation import DistillationObjective, Head, LinearDistillation
from tinystories.model.loss import IGNORE_INDEX, Objective

ROWS, WIDTH, VOCAB = 19, 8, 31


def inputs() -> tuple[Tensor, Tensor, Tensor, list[Head]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[::4] = IGNORE_INDEX
    widths = (WIDTH, 5)  # teachers have their own
    heads = [
        Head(torch.randn(ROWS, w, generator=generator), torch.randn(VOCAB, w, generator=generator)) for w in widths
    ]
    return hidden, weight, targets, heads


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, heads: list[Head], kl_weight: float, temperature: float
) -> Tensor:
    """The same loss from PyTorch's parts, with all logits at once."""
    logits = hidden @ weight.t()
    teacher_p = torch.stack([F.softmax(h @ w.t() / temperature, 1) for h, w in heads]).mean(0)
    divergence = F.kl_div(F.log_softmax(logits / temperature, 1), teacher_p, reduction="none").sum(1)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    return cross_entropy + kl_weight * temperature**2 * divergence[targets != IGNORE_INDEX].sum()


@pytest.mark.parametrize("linear_distillation", [LinearDistillation, CPULinearDistillation])
@pytest.mark.parametrize("n_teachers", [1, 2])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(1.0, 1.0), (0.3, 2.5), (0.0, 1.0)])
@pytest.mark.parametrize(("chunk_size", "tile_size"), [(1, 1), (5, 5), (12, 5), (1000, 4), (1000, 1000)])
def test_loss_and_gradients_equal_pytorchs(
    linear_distillation: type[torch.autograd.Function],
    n_teachers: int,
    kl_weight: float,
    temperature: float,
    chunk_size: int,
    tile_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "split_rows", lambda *_: (chunk_size, tile_size))
    for name, rows in (
        ("MIN_CHUNK_ROWS", chunk_size),
        ("MIN_TILE_ROWS", tile_size),
        ("CHUNK_LOGITS", 0),
        ("TILE_LOGITS", 0),
    ):
        monkeypatch.setattr(cpu_loss, name, rows)
    hidden, weight, targets, heads = inputs()
    settings = (heads[:n_teachers], kl_weight, temperature)
    total, cross_entropy = linear_distillation.apply(hidden, weight, targets, *settings)
    expected = reference(hidden, weight, targets, *settings)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(total / 3, (hidden, weight)),
        torch.autograd.grad(expected / 3, (hidden, weight)),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(cross_entropy, reference(hidden, weight, targets, heads, 0.0, 1.0))
    assert not cross_entropy.requires_grad


@pytest.mark.parametrize("linear_distillation", [LinearDistillation, CPULinearDistillation])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_model_that_is_its_own_teacher_has_no_gradient_of_the_divergence(
    linear_distillation: type[torch.autograd.Function], temperature: float
) -> None:
    hidden, weight, targets, _ = inputs()
    itself = [Head(hidden.detach(), weight.detach())]
    gradients = [
        torch.autograd.grad(
            linear_distillation.apply(hidden, weight, targets, itself, w, temperature)[0], (hidden, weight)
        )
        for w in (0.0, 100.0)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=2e-4)  # 100 times the rounding
    others = inputs()[3][:1]
    moved = torch.autograd.grad(linear_distillation.apply(hidden, weight, targets, others, 100.0, 1.0)[0], (hidden,))
    assert (moved[0] - gradients[0][0]).norm() > 10


@pytest.mark.parametrize("linear_distillation", [LinearDistillation, CPULinearDistillation])
def test_a_teacher_without_any_probability_for_an_id_gives_no_nan(
    linear_distillation: type[torch.autograd.Function],
) -> None:
    hidden, weight, targets, _ = inputs()
    sure = [Head(torch.full((ROWS, 1), 1000.0), torch.arange(float(VOCAB))[:, None])]
    total, _ = linear_distillation.apply(hidden, weight, targets, sure, 1.0, 1.0)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kernels_in_bf16_round_as_pytorch_does(temperature: float) -> None:
    hidden, weight, targets, heads = inputs()
    hidden = hidden.detach().bfloat16().requires_grad_()
    heads = [Head(head.hidden.bfloat16(), head.weight) for head in heads]
    found, expected = (
        function.apply(hidden, weight, targets, heads, 0.7, temperature)
        for function in (CPULinearDistillation, LinearDistillation)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found[0], (hidden, weight)),
        torch.autograd.grad(expected[0], (hidden, weight)),
        rtol=2**-7,
        atol=2e-2,
    )


def test_a_teachers_nan_reaches_the_loss() -> None:
    hidden, weight, targets, heads = inputs()
    heads[1].hidden[1, 0] = torch.nan
    assert CPULinearDistillation.apply(hidden, weight, targets, heads, 1.0, 1.0)[0].isnan()


def test_teachers_are_neither_trained_nor_part_of_the_objective(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]
) -> None:
    student, teacher = awake(tiny()).train(), awake(tiny(architecture="classic", n_layer=1)).requires_grad_(False)
    objective = DistillationObjective(student, [teacher], 0.5, 2.0)
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(3))
    total, cross_entropy = objective(tokens[:, :-1], tokens[:, 1:])
    total.backward()
    torch.testing.assert_close(cross_entropy, Objective(student)(tokens[:, :-1], tokens[:, 1:]).detach())
    assert total > cross_entropy
    assert all(weight.grad is None for weight in teacher.parameters())
    assert len(list(objective.parameters())) == len(list(student.parameters()))


def test_a_teacher_with_the_kernels_of_cpu_training_predicts_the_same_without_dropout(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]
) -> None:
    teacher = awake(tiny(n_ctx=32, dropout=0.9)).eval().requires_grad_(False)
    ids = torch.randint(teacher.config.vocab_size, (3, 32))
    expected = teacher(ids)
    use_cpu_teacher_kernels(teacher, bf16=False)
    calls: list[int] = []
    original = cpu_attention.CausalAttentionFunction.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention.CausalAttentionFunction, "apply", lambda *args: calls.append(1) or original(*args))
        found = teacher(ids)
    assert len(calls) == teacher.config.n_layer
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
