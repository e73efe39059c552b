"""The kernels that are faster in training on a CPU compute what PyTorch's compute: attention, dropout, norms, loss."""

import math
from collections.abc import Callable

import numba
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories import training_kernels
from tinystories.config import ModelConfig
from tinystories.model import GPT, cpu_attention, cpu_loss
from tinystories.model.cpu_attention import causal_attention
from tinystories.model.cpu_functions import gated_silu, rms_norm, split_heads
from tinystories.model.cpu_loss import cpu_linear_cross_entropy
from tinystories.model.cpu_training import use_cpu_training_kernels
from tinystories.model.dropout import FastDropout
from tinystories.model.loss import IGNORE_INDEX, Objective, fused_linear_cross_entropy
from tinystories.model.positional_encoding import apply_rope, build_rope_tables


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def qkv(n_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of two rows with three heads, laid out as a model has them."""
    return [random(2, n_tokens, 3, 8, seed=seed, dtype=dtype).transpose(1, 2) for seed in range(3)]


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_TOKENS_FOR_TWO_BLOCKS", 2)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("n_tokens", [1, 7, 16])
@pytest.mark.parametrize("blocks", [1, 2])
def test_attention_and_its_gradients_equal_pytorchs(
    n_tokens: int, blocks: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "MIN_TOKENS_FOR_TWO_BLOCKS", n_tokens + 2 - blocks)
    assert len(list(cpu_attention.query_blocks(n_tokens))) == min(blocks, n_tokens)
    inputs, grad = qkv(n_tokens), random(2, 3, n_tokens, 8, seed=9).detach()
    ours, expected = (
        causal_attention(*inputs, scale),
        F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale),
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("n_tokens", [15, 16, 17, 31, 33, 50])
def test_attention_of_any_length_equals_pytorchs_also_where_scores_are_large(n_tokens: int) -> None:
    q, k, v = qkv(n_tokens)
    ours, expected = (
        causal_attention(q * 50, k, v),
        F.scaled_dot_product_attention(q * 50, k, v, is_causal=True),
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_attention_does_not_hide_a_number_that_is_not_finite(bad: float) -> None:
    q, k, v = (x.detach() for x in qkv(20))
    k[0, 1, 7, 3] = bad
    y = causal_attention(q, k, v)
    assert not y[0, 1, 7:].isfinite().all()
    assert y[0, 1, :7].isfinite().all()
    assert y[1].isfinite().all()


def test_attention_does_not_look_ahead(two_blocks: None) -> None:  # noqa: ARG001
    """Neither does the output at a position depend on later keys and values, nor their gradient on that output."""
    q, k, v = qkv(10)
    before = causal_attention(q, k, v)
    with torch.no_grad():
        k[:, :, 6:], v[:, :, 6:] = 7.0, -7.0
        after = causal_attention(q, k, v)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6], atol=0, rtol=0)
    assert not torch.equal(after[:, :, 6:], before[:, :, 6:])
    q, k, v = qkv(10)
    for gradient in torch.autograd.grad(causal_attention(q, k, v)[:, :, :6].sum(), (q, k, v)):
        assert gradient[:, :, 6:].count_nonzero() == 0


def test_attention_in_bf16_is_close_to_fp32() -> None:
    exact = F.scaled_dot_product_attention(*qkv(64), is_causal=True)
    rounded = causal_attention(*qkv(64, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(1)
    y = FastDropout(p)(torch.ones(1000, 1001))
    kept = (y != 0).double().mean().item()
    assert kept == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / y.numel()))
    values = y.unique()
    assert len(values) == 2
    assert values[1].item() == pytest.approx(1 / (1 - p), rel=2**-17 / (1 - p) + 1e-6)
    assert y.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / y.numel()))


def test_dropout_depends_on_the_seed_alone() -> None:
    dropout, x = FastDropout(0.3), torch.ones(3, 5, 7)  # not a multiple of the four activations of a draw
    outputs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    neighbors = outputs[0].flatten()
    assert len({tuple(four) for four in neighbors[:104].view(-1, 4).tolist()}) > 4, "the four differ from each other"


def test_dropout_has_the_gradient_of_its_mask_and_is_off_in_eval_mode() -> None:
    dropout, x = FastDropout(0.4), random(40, 50)
    y = dropout(x)
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    torch.testing.assert_close(gradient, torch.where(y != 0, 3 / 0.6, 0.0), rtol=1e-4, atol=0)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_dropout_at_the_ends_stays_finite(p: float) -> None:
    assert FastDropout(p)(torch.ones(64)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 40, 240])
def test_a_norm_that_returns_bf16_rounds_once(width: int, dtype: torch.dtype) -> None:
    x, grad = random(2, 35, width, dtype=dtype), random(2, 35, width, seed=1).detach().bfloat16()
    weight = random(width, seed=2)
    exact = F.rms_norm(x.float(), (width,), weight, 1e-5)
    y = rms_norm(x, weight, 1e-5, torch.bfloat16)
    # A sum in another order may cross the middle between two numbers of bf16, but seldom.
    assert (y != exact.bfloat16()).float().mean() < 1e-3
    torch.testing.assert_close(y.float(), exact, atol=1e-6, rtol=2**-8)
    ours = torch.autograd.grad(y, (x, weight), grad)
    expected = torch.autograd.grad(exact, (x, weight), grad.float())
    assert [gradient.dtype for gradient in ours] == [dtype, torch.float32]
    torch.testing.assert_close(ours[0].float(), expected[0].float(), atol=1e-5, rtol=2**-7)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("n_heads", "size", "n_tokens"), [(1, 2, 1), (3, 6, 7), (6, 40, 33), (2, 64, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_normed_and_rotated_as_by_pytorch(n_heads: int, size: int, n_tokens: int, dtype: torch.dtype) -> None:
    qkv = random(2, n_tokens, 3 * n_heads * size, dtype=dtype)
    weights = random(size, seed=1), random(size, seed=2)
    cos, sin = build_rope_tables(n_tokens, size, 100.0)
    grads = [random(2, n_heads, n_tokens, size, seed=seed, dtype=dtype).detach() for seed in (3, 4, 5)]

    heads = [x.unflatten(-1, (n_heads, size)) for x in qkv.float().chunk(3, dim=-1)]
    normed = [F.rms_norm(x, (size,), weight, 1e-5) for x, weight in zip(heads, weights, strict=False)]
    expected = [*(apply_rope(x.transpose(1, 2), cos, sin) for x in normed), heads[2].transpose(1, 2)]
    ours = split_heads(qkv, *weights, 1e-5, cos, sin)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for x, y in zip(ours, expected, strict=True):
        assert (x.dtype, x.is_contiguous()) == (dtype, True)
        torch.testing.assert_close(x.float(), y, atol=tolerance, rtol=tolerance)
    ours_grads = torch.autograd.grad(ours, (qkv, *weights), grads)
    expected_grads = torch.autograd.grad(expected, (qkv, *weights), [grad.float() for grad in grads])
    for x, y in zip(ours_grads, expected_grads, strict=True):
        assert (x.float() - y.float()).norm() <= tolerance * y.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_silu_and_its_gradients_equal_pytorchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    gate = (torch.randn(2, 5, 50, generator=generator) * 8).to(dtype)
    gate[0, 0, :6] = torch.tensor([0.0, -0.0, 88.0, -88.0, 1e4, -1e4])
    gate.requires_grad_()
    up, grad = random(2, 5, 50, seed=2, dtype=dtype), random(2, 5, 50, seed=3, dtype=dtype).detach()
    expected, ours = F.silu(gate.float()) * up.float(), gated_silu(gate, up)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours.float(), expected, atol=1e-6, rtol=tolerance)
    for x, y in zip(
        torch.autograd.grad(ours, (gate, up), grad),
        torch.autograd.grad(expected, (gate, up), grad.float()),
        strict=True,
    ):
        torch.testing.assert_close(x.float(), y.float(), atol=1e-5, rtol=tolerance)


def test_kernels_round_to_bf16_as_pytorch_does() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(1)).int()
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 2**15  # halfway between two numbers
    x = torch.cat([bits, ties, ties + 1, ties - 1]).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.tensor([math.nan, -math.nan])])
    y = torch.empty(len(x), dtype=torch.bfloat16)

    @numba.njit
    def store(x, y):  # type: ignore[no-untyped-def]
        for i in range(len(x)):
            y[i] = training_kernels.narrow(x[i], y)

    store(training_kernels.as_array(x), training_kernels.as_array(y))
    torch.testing.assert_close(y, x.bfloat16(), atol=0, rtol=0, equal_nan=True)


def test_the_number_of_threads_changes_no_bit(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_kernels, "MIN_NUMBERS_PER_THREAD", 1)
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(3))
    results = []
    for n_threads in (1, 2, 3, 50):
        monkeypatch.setattr(training_kernels.torch, "get_num_threads", lambda n=n_threads: n)
        model = awake(tiny()).train()
        use_cpu_training_kernels(model, bf16=True)
        with torch.autocast("cpu", torch.bfloat16):
            Objective(model, cpu_linear_cross_entropy)(tokens[:, :-1], tokens[:, 1:]).backward()
        results.append([weight.grad for weight in model.parameters()])
    for gradients in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(gradients, results[0], strict=True))


@pytest.mark.parametrize("chunk", [512, 4, 7])
@pytest.mark.parametrize("rows", [1, 23])
def test_the_loss_for_cpus_and_its_gradients_equal_the_fused_ones(
    rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of chunks, also where it does not divide the number of rows."""
    monkeypatch.setattr(cpu_loss, "MIN_CHUNK_ROWS", chunk)
    monkeypatch.setattr(cpu_loss, "CHUNK_LOGITS", 0)
    hidden, weight = random(rows, 8), random(31, 8, seed=1)
    targets = torch.randint(31, (rows,), generator=torch.Generator().manual_seed(2))
    targets[3::5] = IGNORE_INDEX
    ours, expected = (f(hidden, weight, targets) for f in (cpu_linear_cross_entropy, fused_linear_cross_entropy))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours / 3, (hidden, weight)), torch.autograd.grad(expected / 3, (hidden, weight))
    )


def test_the_loss_for_cpus_sums_in_fp32() -> None:
    hidden, weight = random(700, 16, dtype=torch.bfloat16), random(53, 16, seed=1)
    targets = torch.randint(53, (700,), generator=torch.Generator().manual_seed(2))
    ours = cpu_linear_cross_entropy(hidden, weight, targets)
    logits = F.linear(hidden, weight.bfloat16()).float()
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-5, atol=0)
    grad_hidden, grad_weight = torch.autograd.grad(ours, (hidden, weight))
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden.float(), weight), targets, reduction="sum"), weight)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    assert (grad_weight - expected[0]).norm() < 0.02 * expected[0].norm()


SHAPES: dict[str, dict[str, object]] = {
    "modern": {},
    "classic": {"architecture": "classic"},
    "gqa": {"n_kv_head": 2},
    "window": {"architecture": "classic", "window": 4},
    "unscaled": {"architecture": "classic", "scaled_scores": False},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_with_these_kernels_has_the_same_loss_and_gradients(
    shape: str, bf16: bool, tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]
) -> None:
    config = tiny(**SHAPES[shape])
    tokens = torch.randint(61, (8, 24), generator=torch.Generator().manual_seed(3))
    results = []
    for fast in (False, True):
        model = awake(config).train()
        if fast:
            use_cpu_training_kernels(model, bf16=bf16)
        objective = Objective(model, cpu_linear_cross_entropy if fast else fused_linear_cross_entropy)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and fast):
            loss = objective(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss, {name: weight.grad for name, weight in model.named_parameters()}))
    tolerance = 0.03 if bf16 else 1e-5
    torch.testing.assert_close(results[1][0], results[0][0], rtol=tolerance, atol=0)
    for name, gradient in results[0][1].items():
        assert gradient is not None
        assert (results[1][1][name] - gradient).norm() <= (0.15 if bf16 else 1e-4) * gradient.norm(), name


def test_kernels_change_nothing_in_eval_mode_and_nothing_that_is_saved(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT]
) -> None:
    model, tokens = awake(tiny(dropout=0.2)), torch.arange(20)[None]
    names = list(model.state_dict())
    before = model(tokens)
    use_cpu_training_kernels(model, bf16=True)
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert torch.equal(model(tokens), before)
    assert list(model.state_dict()) == names
