"""Names and shapes of the weights, as in `model.safetensors`."""

from collections.abc import Mapping

from tinystories.config import ModelConfig
from tinystories.errors import UserError, quoted

EMBEDDING, POSITION_EMBEDDING, LM_HEAD = "embed_tokens.weight", "embed_positions.weight", "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name in `model.safetensors`."""
    C, F, D = config.n_embd, config.n_ff, config.head_dim
    q, kv = config.n_head * D, config.kv_heads * D
    classic = config.architecture == "classic"
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, C), "norm.weight": (C,)}
    if config.learned_positions:
        shapes[POSITION_EMBEDDING] = (config.n_ctx, C)
    if classic:
        shapes["norm.bias"] = (C,)
    if not config.tied:
        shapes[LM_HEAD] = (config.vocab_size, C)
    for i in range(config.n_layer):
        prefix = f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (C,)
            if classic:
                shapes[f"{prefix}{norm}.bias"] = (C,)
        for name, out_features in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out_features, C)
            if config.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out_features,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (C, q)
        for name, shape in (("up", (F, C)), ("down", (C, F))):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
        if classic:
            shapes[f"{prefix}self_attn.o_proj.bias"] = (C,)
            shapes[f"{prefix}mlp.up_proj.bias"], shapes[f"{prefix}mlp.down_proj.bias"] = (F,), (C,)
        else:
            shapes[f"{prefix}mlp.gate_proj.weight"] = (F, C)
            if config.qk_norm:
                shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (D,)
    return shapes


def check_weights(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str) -> None:
    """Raise `UserError`, naming `where`, if a weight is missing or unknown or its shape is not the expected one."""
    if config.n_layer > len(shapes):  # before a forged number of layers takes memory for names
        raise UserError(f"{where} has {len(shapes)} weights, too few for n_layer={quoted(config.n_layer)}")
    expected = expected_shapes(config)
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes or name not in expected:
            raise UserError(f"{where}: weight {quoted(name)} is {'unknown' if name in shapes else 'missing'}")
        if shapes[name] != expected[name]:
            raise UserError(f"{where}: weight {name} has shape {shapes[name]}, expected {expected[name]}")
