"""The same logits as Hugging Face's models with the same weights (no download: their code, our weights)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tinystories.checkpoint import saved_weights
from tinystories.config import ModelConfig
from tinystories.interop.hf import to_transformers
from tinystories.model import GPT


def random_tokens() -> Tensor:
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(8))


def require_same_logits(ours: GPT, kind: str) -> None:
    theirs = to_transformers(ours.config, saved_weights(ours))
    assert type(theirs).__name__ == kind
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs(tokens).logits
        difference = (ours.logits(ours(tokens)) - expected).abs().max()
    assert expected.std() > 0.5, "logits too flat to compare"
    assert difference <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_modern_is_qwen3(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], n_kv_head: int, tied: bool
) -> None:
    model = awake(tiny(n_kv_head=n_kv_head, tied=tied, rope_base=500.0, norm_eps=1e-3))
    require_same_logits(model, "Qwen3ForCausalLM")


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_modern_without_qk_norm_is_llama(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], n_kv_head: int
) -> None:
    model = awake(tiny(n_kv_head=n_kv_head, qk_norm=False, rope_base=500.0, norm_eps=1e-3))
    require_same_logits(model, "LlamaForCausalLM")


@pytest.mark.parametrize("tied", [False, True])
def test_classic_is_gpt2_with_relu_and_sinusoids(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], tied: bool
) -> None:
    model = awake(tiny(architecture="classic", tied=tied, n_ff=56, norm_eps=1e-3))
    require_same_logits(model, "GPT2LMHeadModel")
