"""Properties of both architectures: causality, batches, dropout, first loss, number of parameters."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories.config import ModelConfig
from tinystories.config_file import PRESETS, load_config
from tinystories.model import GPT


def test_a_hidden_state_depends_on_its_past_and_on_nothing_else(model: GPT, tokens: Tensor) -> None:
    """The gradient with respect to every later embedding is exactly zero; to every earlier one it is not."""
    embedded: list[Tensor] = []
    hook = model.embed_tokens.register_forward_hook(lambda _, __, output: embedded.append(output))
    hidden = model(tokens)
    hook.remove()
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    for t in range(tokens.shape[1]):
        (gradient,) = torch.autograd.grad(hidden[0, t] @ direction, embedded[0], retain_graph=True)
        influence = gradient.abs().amax(dim=-1)
        assert (influence[0, : t + 1] > 0).all()
        assert (influence[0, t + 1 :] == 0).all()
        assert (influence[1] == 0).all(), "rows of a batch must not see each other"


def test_every_second_block_sees_as_far_as_its_window(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], tokens: Tensor
) -> None:
    """The gradient of each block with respect to its own input is zero outside the window."""
    model = awake(tiny(architecture="classic", window=4, n_layer=4))
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    model(tokens)
    for i, (x, y) in enumerate(seen):
        for t in range(tokens.shape[1]):
            (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
            influence = gradient[0].abs().amax(dim=-1)
            first = max(0, t - 3) if i % 2 else 0
            assert (influence[first : t + 1] > 0).all()
            assert (influence[:first] == 0).all()
            assert (influence[t + 1 :] == 0).all()


@settings(deadline=None, max_examples=10)
@given(batch=st.integers(1, 5), length=st.integers(1, 24), seed=st.integers(0, 2**32))
def test_a_batch_gives_what_its_rows_give_alone(model: GPT, batch: int, length: int, seed: int) -> None:
    rows = torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        alone = torch.cat([model.logits(model(row[None])) for row in rows])
        torch.testing.assert_close(model.logits(model(rows)), alone, rtol=1e-4, atol=1e-5)


def test_positions_matter(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], architecture: str
) -> None:
    """Without positions a single layer could not distinguish these two orders at their common last token."""
    model = awake(tiny(architecture=architecture, n_layer=1))
    with torch.no_grad():
        one, other = model(torch.tensor([[7, 9, 4], [9, 7, 4]]))[:, -1]
    assert (one - other).abs().max() > 1e-3


def test_more_tokens_than_the_context_are_refused(model: GPT) -> None:
    with pytest.raises(AssertionError, match="context"):
        model(torch.zeros(1, model.config.n_ctx + 1, dtype=torch.long))


def test_dropout_is_on_in_training_and_off_in_eval(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], architecture: str, tokens: Tensor
) -> None:
    """On the embedding sum and after each sub-layer; in eval mode the model is the one without dropout."""
    config = tiny(architecture=architecture, dropout=0.4)
    model, without = awake(config), awake(dataclasses.replace(config, dropout=0.0))
    dropped: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, output: dropped.append((output == 0).float().mean().item()))
    assert torch.equal(model(tokens), without(tokens))
    assert all(share == 0 for share in dropped)
    dropped.clear()
    assert not torch.allclose(model.train()(tokens), without(tokens))
    assert len(dropped) == 1 + 2 * config.n_layer
    assert all(0.3 < share < 0.5 for share in dropped)
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("n_embd", "vocab_size"), [(64, 4096), (192, 4096), (512, 4096), (512, 50257)], ids=lambda value: str(value)
)
def test_the_first_loss_is_that_of_a_guess(architecture: str, tied: bool, n_embd: int, vocab_size: int) -> None:
    """Within 1% of ln(vocabulary)."""
    torch.manual_seed(11)
    sizes = {"n_ctx": 32, "n_layer": 2, "n_head": 4, "n_ff": 2 * n_embd, "n_embd": n_embd, "vocab_size": vocab_size}
    model = GPT(ModelConfig(architecture=architecture, tied=tied, **sizes))  # type: ignore[arg-type]
    tokens = torch.randint(vocab_size, (4, 33))
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1])).flatten(0, 1)
    assert F.cross_entropy(logits, tokens[:, 1:].flatten()).item() == pytest.approx(math.log(vocab_size), rel=0.01)


def test_every_weight_starts_as_gpt2s_but_the_head(architecture: str) -> None:
    """A matrix whose name no rule matches still trains, only worse; no other test would notice."""
    torch.manual_seed(12)
    model = GPT(ModelConfig(architecture=architecture, vocab_size=500, n_layer=8, n_embd=96, tied=False))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif name.startswith("layers"):
            into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.02 / (16**0.5 if into_the_stream else 1), rel=0.05), name
    assert model.lm_head.weight.std().item() == pytest.approx(1 / 96, rel=0.05)


def test_learned_positions_start_on_the_scale_of_the_embedding(tiny: Callable[..., ModelConfig]) -> None:
    """Otherwise one would drown out the other."""
    torch.manual_seed(12)
    model = GPT(tiny(architecture="classic", learned_positions=True, tied=False, n_embd=96, n_ctx=61))
    for weight in (model.embed_tokens.weight, model.embed_positions.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_seed_decides_the_weights(tiny: Callable[..., ModelConfig], architecture: str) -> None:
    torch.manual_seed(4)
    model = GPT(tiny(architecture=architecture))
    first = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.reset_parameters()
    assert any(not torch.equal(first[name], weight) for name, weight in model.state_dict().items())
    torch.manual_seed(4)
    assert all(torch.equal(first[name], weight) for name, weight in GPT(model.config).state_dict().items())


def test_a_tied_head_is_the_embedding(model: GPT) -> None:
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tied


def test_weights_are_all_that_is_saved(model: GPT) -> None:
    """Position tables follow from the config and are not saved in a checkpoint."""
    assert set(model.state_dict()) - {"lm_head.weight"} == {name for name, _ in model.named_parameters()} - {
        "lm_head.weight"
    }


def test_the_config_counts_the_models_parameters(model: GPT) -> None:
    assert model.config.n_params == sum(weight.numel() for weight in model.parameters())


def test_the_original_programs_model_has_its_number_of_parameters() -> None:
    original = ModelConfig(
        architecture="classic",
        vocab_size=50257,
        n_ctx=512,
        n_layer=12,
        n_head=8,
        n_embd=512,
        n_ff=2048,
        tied=False,
        dropout=0.1,
    )
    for config in (original, load_config("seed-89m").model):
        with torch.device("meta"):
            model = GPT(config)
        assert sum(weight.numel() for weight in model.parameters()) == 89_274_368
        assert config.n_params == 89_274_368


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_built(preset: str) -> None:
    config = load_config(preset).model
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 4096)
    with torch.device("meta"):
        model = GPT(config)
        hidden = model(torch.zeros(2, config.n_ctx, dtype=torch.long))
    assert model.logits(hidden).shape == (2, config.n_ctx, config.vocab_size)
