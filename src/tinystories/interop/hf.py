"""Our weights as models of Hugging Face transformers, with no code of our own in them."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from tinystories.config import ModelConfig
from tinystories.positions import sinusoid_table


def to_transformers(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """`classic` as GPT2LMHeadModel, `modern` as Qwen3ForCausalLM or, without QK-norm, LlamaForCausalLM.

    `weights`: by their names in `model.safetensors`. In evaluation mode; the logits are ours but for rounding.
    """
    if config.architecture == "classic":
        model: Any = transformers.GPT2LMHeadModel(gpt2_config(config))
        named = gpt2_weights(config, weights)
    else:
        kind = "Qwen3" if config.qk_norm else "Llama"
        settings = llama_settings(config) | ({} if config.qk_norm else {"mlp_bias": False})
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
        named = {f"model.{name}": weight for name, weight in weights.items() if name != "lm_head.weight"}
        named["lm_head.weight"] = weights["embed_tokens.weight" if config.tied else "lm_head.weight"]
    model.load_state_dict(named, strict=True)
    return model.eval()


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
        "bos_token_id": None,
        "eos_token_id": None,
    }


def gpt2_config(config: ModelConfig) -> Any:
    return transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_ctx,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_ff,
        activation_function="relu",
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
    )


def gpt2_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices transposed, q, k and v as one with biases (zero here), positions as learned ones."""
    named = {
        "transformer.wte.weight": weights["embed_tokens.weight"],
        "transformer.wpe.weight": torch.from_numpy(sinusoid_table(config.n_ctx, config.n_embd)),
        "transformer.ln_f.weight": weights["norm.weight"],
        "transformer.ln_f.bias": weights["norm.bias"],
        "lm_head.weight": weights["embed_tokens.weight" if config.tied else "lm_head.weight"],
    }
    for i in range(config.n_layer):
        here, there = f"layers.{i}.", f"transformer.h.{i}."
        matrices = [weights[f"{here}self_attn.{name}_proj.weight"] for name in "qkv"]
        named[f"{there}attn.c_attn.weight"] = torch.cat(matrices).t()
        named[f"{there}attn.c_attn.bias"] = torch.zeros(3 * config.n_embd)
        for ours, theirs in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.c_fc"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            named[f"{there}{theirs}.weight"] = weights[f"{here}{ours}.weight"].t()
            named[f"{there}{theirs}.bias"] = weights[f"{here}{ours}.bias"]
        for ours, theirs in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
            for kind in ("weight", "bias"):
                named[f"{there}{theirs}.{kind}"] = weights[f"{here}{ours}.{kind}"]
    return named


def write(model: "Portable", path: "Path", precision: str) -> None:
    raise NotImplementedError


def logits(path: "Path", ids: list[int]) -> Any:
    raise NotImplementedError


def read(path: "Path", tokenizer: "Path | None") -> "Portable":
    raise NotImplementedError
