"""The same logits as Hugging Face's models with the same weights (no download: their code, our weights)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinystories.config import ModelConfig
from tinystories.model import GPT

transformers = pytest.importorskip("transformers")


def random_tokens() -> Tensor:
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(8))


def require_same_logits(ours: GPT, theirs: nn.Module) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        difference = (ours.logits(ours(tokens)) - expected).abs().max()
    assert expected.std() > 0.5, "logits too flat to compare"
    assert difference <= 1e-4


def llama_settings(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
    }


def load_by_name(theirs: nn.Module, ours: GPT) -> None:
    """Our names are theirs: the body under `model.`, the head at the top."""
    body = {f"model.{name}": weight for name, weight in ours.state_dict().items() if name != "lm_head.weight"}
    theirs.load_state_dict(body | {"lm_head.weight": ours.lm_head.weight}, strict=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_modern_is_qwen3(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], n_kv_head: int, tied: bool
) -> None:
    ours = awake(tiny(n_kv_head=n_kv_head, tied=tied, rope_base=500.0, norm_eps=1e-3))
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama_settings(ours.config)))
    load_by_name(theirs, ours)
    require_same_logits(ours, theirs)


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_modern_without_qk_norm_is_llama(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], n_kv_head: int
) -> None:
    ours = awake(tiny(n_kv_head=n_kv_head, qk_norm=False, rope_base=500.0, norm_eps=1e-3))
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_settings(ours.config), mlp_bias=False))
    load_by_name(theirs, ours)
    require_same_logits(ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_classic_is_gpt2_with_relu_and_sinusoids(
    tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], tied: bool
) -> None:
    ours = awake(tiny(architecture="classic", tied=tied, n_ff=56, norm_eps=1e-3))
    config = ours.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_ctx,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.n_ff,
            activation_function="relu",
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=tied,
        )
    )
    theirs.load_state_dict(gpt2_weights(ours), strict=True)
    require_same_logits(ours, theirs)


def gpt2_weights(ours: GPT) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices transposed, q, k and v as one, with biases (zero here)."""
    weights = {
        "transformer.wte.weight": ours.embed_tokens.weight,
        "transformer.wpe.weight": ours.get_buffer("sinusoid"),
        "transformer.ln_f.weight": ours.get_parameter("norm.weight"),
        "transformer.ln_f.bias": ours.get_parameter("norm.bias"),
        "lm_head.weight": ours.lm_head.weight,
    }
    for i in range(ours.config.n_layer):
        ours_at, theirs_at = f"layers.{i}", f"transformer.h.{i}"
        matrices: list[Tensor] = [ours.get_parameter(f"{ours_at}.self_attn.{name}_proj.weight") for name in "qkv"]
        weights[f"{theirs_at}.attn.c_attn.weight"] = torch.cat(matrices).t()
        weights[f"{theirs_at}.attn.c_attn.bias"] = torch.zeros(3 * ours.config.n_embd)
        for name, there in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.c_fc"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            weights[f"{theirs_at}.{there}.weight"] = ours.get_parameter(f"{ours_at}.{name}.weight").t()
            weights[f"{theirs_at}.{there}.bias"] = ours.get_parameter(f"{ours_at}.{name}.bias")
        for name, there in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            for kind in ("weight", "bias"):
                weights[f"{theirs_at}.{there}.{kind}"] = ours.get_parameter(f"{ours_at}.{name}.{kind}")
    return weights
