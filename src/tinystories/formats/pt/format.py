"""Import state dicts (.pt) of the original TinyStories GPT program and similar small pre-LayerNorm GPTs.

The architecture is inferred from names and shapes. TOP_PATTERNS and LAYER_PATTERNS list the known names: those of
Karpathy's "Let's build GPT" lecture (github.com/karpathy/ng-video-lecture), minGPT, nanoGPT, and ours. What a state
dict does not record is assumed as in the original, with a warning if it is a size: 64-wide heads, a norm epsilon of
1e-5, scores divided by the square root of the head dimension.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import load_gpt2
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError, quoted
from tinystories.formats.bundle import MAX_LAYERS, ModelBundle
from tinystories.formats.torch_file import load_state_dict
from tinystories.position_tables import build_sinusoid_table

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]

NAME_PREFIX = re.compile(r"(_orig_mod\.|module\.|model\.|transformer\.|gpt\.)*")
GPT2_VOCAB_SIZES = (50257, 50304)  # exact, and padded to a multiple of 64 as in nanoGPT
DEFAULT_HEAD_DIM = 64
DEFAULT_CONTEXT = 512
MAX_COUNT = 2**24  # largest plausible n_head or context length

ATTENTION = r"(?:self_attn|sa|attn|attention|self_attention|mha)"
FEED_FORWARD = r"(?:mlp|ffwd|ff|ffn|feed_forward)"
TOP_PATTERNS = {
    "embed_tokens": "embed_tokens|token_embedding_table|token_embedding|tok_emb|wte|embedding",
    "embed_positions": "embed_positions|position_embedding_table|position_embedding|pos_emb|wpe",
    "norm": "norm|ln_f|final_norm",
    "lm_head": "lm_head|head|output",
    "pe": r"(?:(?:pos_enc|pos_encoding|positional_encoding|pos_embedding|pos_emb|position)\.)?pe",
}
LAYER_PATTERNS = {
    "input_layernorm": "input_layernorm|ln1|ln_1|norm1",
    "post_attention_layernorm": "post_attention_layernorm|ln2|ln_2|norm2",
    "self_attn.q_proj": rf"{ATTENTION}\.(?:q_proj|query|q|wq)",
    "self_attn.k_proj": rf"{ATTENTION}\.(?:k_proj|key|k|wk)",
    "self_attn.v_proj": rf"{ATTENTION}\.(?:v_proj|value|v|wv)",
    "self_attn.qkv": rf"{ATTENTION}\.(?:c_attn|qkv|qkv_proj|in_proj)",  # q, k, v concatenated along axis 0
    "self_attn.heads.{}.q": rf"{ATTENTION}\.heads\.(\d+)\.(?:query|q)",
    "self_attn.heads.{}.k": rf"{ATTENTION}\.heads\.(\d+)\.(?:key|k)",
    "self_attn.heads.{}.v": rf"{ATTENTION}\.heads\.(\d+)\.(?:value|v)",
    "self_attn.o_proj": rf"{ATTENTION}\.(?:o_proj|proj|c_proj|out_proj|wo)",
    "mlp.up_proj": rf"{FEED_FORWARD}\.(?:up_proj|c_fc|fc1|linear1|net\.0)",
    "mlp.down_proj": rf"{FEED_FORWARD}\.(?:down_proj|c_proj|fc2|linear2|net\.2)",
}
LAYER_NAME = re.compile(r"(?:layers|blocks|h)\.(\d{1,4})\.(.+)\.(weight|bias)")
MASK_NAME = re.compile(
    rf"(?:layers|blocks|h)\.\d+\.{ATTENTION}\.(?:heads\.\d+\.)?(?:tril|mask|bias|causal_mask|masked_bias)"
)
GELU_NAME = re.compile(r"h\.\d+\.mlp\.c_fc\.weight")  # the name in nanoGPT and minGPT, which use GELU


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a state dict as a `classic` model.

    `tokenizer`: a tokenizer.json; by default GPT-2's, if the vocabulary size is GPT-2's. `UserError` if the file is
    damaged, contains anything but tensors and plain values, or weights that match none of the patterns above.
    """
    state, hyperparameters = load_state_dict(path)
    weights = rename_weights(state, path)
    context = weights.pop("context", None)
    n_head = merge_heads(weights, path)
    config = infer_config(weights, n_head, context, hyperparameters, path)
    add_zero_biases(weights, config)
    loaded_tokenizer = Tokenizer.load(tokenizer) if tokenizer else default_tokenizer(config.vocab_size, path)
    provenance = {"imported_from": path.name, "format": "state dict"}
    return ModelBundle(config=config, weights=weights, tokenizer=loaded_tokenizer, provenance=provenance)


def rename_weights(state: Mapping[str, "Tensor"], path: Path) -> dict[str, Any]:
    """Return fp32 arrays by our names; fused qkv and per-head weights are left for `merge_heads`.

    Two entries are not weights: "context", the context length if a causal mask shows it, and "gelu", true if the names
    are those of a model with GELU. `UserError` for unknown or duplicate names, and values that are not weights.
    """
    weights: dict[str, Any] = {}
    for name, tensor in state.items():
        bare_name = name[NAME_PREFIX.match(name).end() :]  # type: ignore[union-attr]
        if MASK_NAME.fullmatch(bare_name):
            if 0 < tensor.numel() < MAX_COUNT:
                weights["context"] = tensor.shape[-1] if tensor.ndim else None
            continue
        new_name = map_name(bare_name)
        if new_name is None:
            raise UserError(f"{path}: weight {quoted(name)} is unknown; docs/interop.md lists the supported names")
        if new_name in weights:
            raise UserError(f"{path}: weight {quoted(name)} is duplicated under a different name")
        if not tensor.is_floating_point() or tensor.ndim not in ((2, 3) if new_name == "pe" else (1, 2)):
            raise UserError(
                f"{path}: {quoted(name)} is {tensor.dtype} of shape {quoted(tuple(tensor.shape))}, not a matrix of"
                " weights"
            )
        weights[new_name] = tensor.float().numpy(force=True)
        if GELU_NAME.fullmatch(bare_name):
            weights["gelu"] = True
    return weights


def map_name(bare_name: str) -> str | None:
    """Return our name of a weight, given without prefix; None if it is unknown."""
    for new_name, pattern in TOP_PATTERNS.items():
        if re.fullmatch(pattern, bare_name.removesuffix(".weight").removesuffix(".bias")):
            return new_name if new_name == "pe" else f"{new_name}.{bare_name.rpartition('.')[2]}"
    if match := LAYER_NAME.fullmatch(bare_name):
        layer, rest, suffix = match.groups()
        for new_name, pattern in LAYER_PATTERNS.items():
            if inner := re.fullmatch(pattern, rest):
                return f"layers.{int(layer)}.{new_name.format(*inner.groups())}.{suffix}"
    return None


def merge_heads(weights: dict[str, Any], path: Path) -> int:
    """Turn fused and per-head weights into one matrix each for q, k and v; return n_head if names show it, else 0."""
    n_head = 0
    for name in [name for name in weights if ".self_attn.qkv." in name]:
        parts = np.split(weights.pop(name), 3) if len(weights[name]) % 3 == 0 else []
        if not parts:
            raise UserError(f"{path}: {name} cannot be split into q, k and v")
        for letter, part in zip("qkv", parts, strict=True):
            weights[name.replace(".qkv.", f".{letter}_proj.")] = part
    head_weights: dict[str, dict[int, Array]] = {}
    for name in [name for name in weights if ".heads." in name]:
        layer, head_index, letter, suffix = re.fullmatch(r"(.+)\.heads\.(\d+)\.(.)\.(.+)", name).groups()  # type: ignore[union-attr]
        head_weights.setdefault(f"{layer}.{letter}_proj.{suffix}", {})[int(head_index)] = weights.pop(name)
    for name, parts_by_head in head_weights.items():
        n_head = len(parts_by_head)
        shapes = {part.shape for part in parts_by_head.values()}
        if sorted(parts_by_head) != list(range(n_head)) or len(shapes) > 1:
            raise UserError(f"{path}: heads of {name} are missing, or differ in shape")
        weights[name] = np.concatenate([parts_by_head[i] for i in range(n_head)])
    return n_head


def infer_config(
    weights: dict[str, Any], n_head: int, context: int | None, hyperparameters: Mapping[str, Any], path: Path
) -> ModelConfig:
    """Infer the config from shapes, names and `hyperparameters`; remove entries of `weights` that the config replaces.

    `n_head`, `context`: 0 or None if unknown. What nothing records is assumed, with a warning. `UserError` if this is
    not a GPT that `classic` can represent.
    """
    embedding, up_proj = weights.get("embed_tokens.weight"), weights.get("layers.0.mlp.up_proj.weight")
    if embedding is None or up_proj is None or embedding.ndim != 2 or up_proj.shape[1:] != embedding.shape[1:]:
        raise UserError(
            f"{path} is not a GPT: the embedding or the first block is missing, or their shapes do not match"
        )
    V, C = embedding.shape
    layer_indices = {int(name.split(".")[1]) for name in weights if name.startswith("layers.")}
    if layer_indices != set(range(len(layer_indices))) or len(layer_indices) > MAX_LAYERS:
        raise UserError(
            f"{path}: blocks are missing: it has {len(layer_indices)}, but the last is number {max(layer_indices)}"
        )
    # An LM head that equals the embedding is treated as tied.
    lm_head = weights.get("lm_head.weight")
    settings: dict[str, Any] = {"tied": lm_head is None or np.array_equal(lm_head, embedding)}
    if settings["tied"]:
        weights.pop("lm_head.weight", None)
    position_table = weights.pop("pe", None)
    if position_table is not None:
        position_table = (
            position_table.reshape(-1, position_table.shape[-1])
            if position_table.ndim == 2 or 1 in position_table.shape[:2]
            else position_table
        )
        if (
            position_table.ndim != 2
            or position_table.shape[1] != C
            or not np.allclose(position_table, build_sinusoid_table(*position_table.shape), atol=1e-3)
        ):
            raise UserError(f"{path}: its position table `pe` is not the sinusoids of 'Attention Is All You Need'")
        context = context or len(position_table)
    if (position_embedding := weights.get("embed_positions.weight")) is not None:
        settings["learned_positions"], context = True, len(position_embedding)
    if weights.pop("gelu", False):
        settings["activation"] = "gelu_erf"
    drop_zero_biases(weights)
    if any(re.search(r"[qkv]_proj\.bias", name) for name in weights):
        settings["qkv_bias"] = True
    if "lm_head.bias" in weights:
        raise UserError(f"{path}: its LM head has a bias, which our models do not have; train it without")
    n_head = (
        n_head
        or get_count(hyperparameters, "n_head")
        or assume(C // DEFAULT_HEAD_DIM or 1, f"a head dimension of {DEFAULT_HEAD_DIM}", path)
    )
    context = (
        get_count(hyperparameters, "block_size")
        or context
        or assume(DEFAULT_CONTEXT, f"a context of {DEFAULT_CONTEXT} tokens", path)
    )
    field_names = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown_fields := sorted(settings.keys() - field_names):
        raise UserError(f"{path} has {' and '.join(unknown_fields)}, which our classic models do not support")
    return ModelConfig(
        architecture="classic",
        vocab_size=V,
        n_ctx=context,
        n_layer=len(layer_indices),
        n_head=n_head,
        n_embd=C,
        n_ff=len(up_proj),
        qk_norm=False,
        norm_eps=1e-5,
        **settings,
    )


def get_count(hyperparameters: Mapping[str, Any], key: str) -> int:
    """Return a positive integer of the hyperparameters; 0 if it is missing or implausible."""
    value = hyperparameters.get(key)
    return value if type(value) is int and 0 < value < MAX_COUNT else 0


def assume(value: int, assumption: str, path: Path) -> int:
    """Return `value`, after a warning that it was assumed."""
    log.warning("%s does not record it, assuming %s", path, assumption)
    return value


def drop_zero_biases(weights: dict[str, Any]) -> None:
    """Remove all-zero biases of q, k, v and the LM head, which have no effect and which our models may lack."""
    for name in [n for n in weights if re.search(r"([qkv]_proj|lm_head)\.bias$", n) and not weights[n].any()]:
        del weights[name]


def add_zero_biases(weights: dict[str, Any], config: ModelConfig) -> None:
    """Add zeros for the biases that `classic` has and the state dict lacks."""
    widths = {"self_attn.o_proj": config.n_embd, "mlp.up_proj": config.n_ff, "mlp.down_proj": config.n_embd}
    widths |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), config.n_embd)
    weights.setdefault("norm.bias", np.zeros(config.n_embd, np.float32))
    for i in range(config.n_layer):
        for name, width in widths.items():
            weights.setdefault(f"layers.{i}.{name}.bias", np.zeros(width, np.float32))
        for letter in "qkv" if getattr(config, "qkv_bias", False) else "":
            weights.setdefault(f"layers.{i}.self_attn.{letter}_proj.bias", np.zeros(config.n_embd, np.float32))


def default_tokenizer(vocab_size: int, path: Path) -> Tokenizer:
    """Return GPT-2's tokenizer; `UserError` if the vocabulary size is not GPT-2's."""
    if vocab_size not in GPT2_VOCAB_SIZES:
        raise UserError(
            f"{path} has {vocab_size:,} ids, so its tokenizer is not GPT-2's; pass its tokenizer.json with --tokenizer"
        )
    return load_gpt2()
