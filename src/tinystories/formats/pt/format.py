"""Import state dicts (.pt) of the original TinyStories GPT program and similar small pre-LayerNorm GPTs.

The architecture is inferred from names and shapes. RENAMES lists the known names: those of Karpathy's "Let's build GPT"
lecture (github.com/karpathy/ng-video-lecture) and nanoGPT, beside ours. What a state dict does not record is assumed as
in the original, with a warning if it is a size: 64-wide heads, a norm epsilon of 1e-5, scores divided by the square
root of the head dimension.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import GPT2_VOCAB_SIZES, load_gpt2
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError, quoted
from tinystories.formats.bundle import MAX_LAYERS, Array, ModelBundle
from tinystories.formats.end_token import adapt_tokenizer, read_candidates, read_tokenizer_text
from tinystories.formats.protocol import Format, starts_with
from tinystories.formats.torch_file import FLOAT_TYPES, load_state_dict
from tinystories.position_tables import build_sinusoid_table
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING, expected_shapes

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

DEFAULT_HEAD_DIM = 64
DEFAULT_CONTEXT = 512
MAX_COUNT = 2**24  # largest plausible n_head or context length

# Applied in this order to each name.
RENAMES = (
    (r"^(_orig_mod\.|module\.|model\.|transformer\.)*", ""),
    (r"^(token_embedding_table|wte)\.", "embed_tokens."),
    (r"^(position_embedding_table|wpe)\.", "embed_positions."),
    (r"^ln_f\.", "norm."),
    (r"^(.*\.)?pe$", "pe"),  # a table of sinusoids
    (r"^(blocks|h)\.", "layers."),
    (r"\.ln_?1\.", ".input_layernorm."),
    (r"\.ln_?2\.", ".post_attention_layernorm."),
    (r"\.(sa|attn)\.", ".self_attn."),
    (r"\.ffwd\.", ".mlp."),
    (r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.", r".\1\2\3_proj."),
    (r"self_attn\.c_attn\.", "self_attn.qkv."),  # q, k, v concatenated along axis 0
    (r"self_attn\.(c_)?proj\.", "self_attn.o_proj."),
    (r"mlp\.(net\.0|c_fc)\.", "mlp.up_proj."),
    (r"mlp\.(net\.2|c_proj)\.", "mlp.down_proj."),
)
# Of our names: a causal mask, and a projection of one head.
MASK_NAME = re.compile(r"layers\.\d+\.self_attn\.(heads\.\d+\.)?(tril|mask|bias|masked_bias)")
HEAD_NAME = re.compile(r"(layers\.\d+\.self_attn)\.heads\.(\d{1,4})\.(.+)", re.ASCII)


def can_read(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".pt", ".pth", ".ckpt") or starts_with(path, b"PK"))


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a state dict as a `classic` model.

    `tokenizer`: a tokenizer.json, or `gpt2`; by default GPT-2's, if the vocabulary size is GPT-2's. `UserError` if the
    file is damaged, contains anything but tensors and plain values, or is not a GPT that `classic` can represent.
    """
    state, hyperparameters = load_state_dict(path)
    settings: dict[str, Any] = {"activation": "gelu_erf"} if any("mlp.c_fc." in name for name in state) else {}
    weights = rename_weights(state, settings, path)
    merge_heads(weights, settings, path)
    read_positions(weights, settings, path)
    drop_redundant_weights(weights, settings)
    config = read_config(weights, settings, hyperparameters, path)
    for name, shape in expected_shapes(config).items():
        if name.endswith(".bias"):
            weights.setdefault(name, np.zeros(shape, np.float32))
    if tokenizer is None and config.vocab_size not in GPT2_VOCAB_SIZES:
        raise UserError(
            f"{path} has {config.vocab_size:,} ids, so its tokenizer is not GPT-2's; pass its tokenizer.json with"
            " --tokenizer"
        )
    return ModelBundle(
        config=config,
        weights=weights,
        tokenizer=load_tokenizer(tokenizer, config.vocab_size) if tokenizer else load_gpt2(),
        provenance={"imported_from": path.name, "format": "state dict"},
    )


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer.json, or GPT-2's tokenizer if `path` is `gpt2`; files beside it tell which token is END."""
    return adapt_tokenizer(read_tokenizer_text(path), read_candidates(path.parent), vocab_size, str(path))


def rename_weights(state: Mapping[str, "Tensor"], settings: dict[str, Any], path: Path) -> dict[str, Array]:
    """Return fp32 arrays by our names; unknown names, fused qkv and weights of single heads keep theirs.

    A causal mask is dropped and adds `n_ctx` to `settings`. `UserError` for duplicates and values that are not weights.
    """
    weights: dict[str, Array] = {}
    for name, tensor in state.items():
        new_name = name
        for pattern, replacement in RENAMES:
            new_name = re.sub(pattern, replacement, new_name)
        if MASK_NAME.fullmatch(new_name):
            if tensor.ndim and 0 < tensor.numel() < MAX_COUNT:
                settings["n_ctx"] = tensor.shape[-1]
            continue
        if new_name in weights:
            raise UserError(f"{path}: weight {quoted(name)} is duplicated under a different name")
        if str(tensor.dtype) not in FLOAT_TYPES or tensor.ndim not in ((2, 3) if new_name == "pe" else (1, 2)):
            raise UserError(
                f"{path}: {quoted(name)} is {tensor.dtype} of shape {quoted(tuple(tensor.shape))}, not a matrix of"
                " weights in fp32, fp16 or bf16"
            )
        weights[new_name] = tensor.float().numpy(force=True)
    return weights


def merge_heads(weights: dict[str, Array], settings: dict[str, Any], path: Path) -> None:
    """Turn fused and per-head weights into one matrix each for q, k and v; heads add `n_head` to `settings`."""
    for name in [name for name in weights if ".self_attn.qkv." in name]:
        fused = weights.pop(name)
        if len(fused) % 3:
            raise UserError(f"{path}: {name} cannot be split into q, k and v")
        weights |= {
            name.replace(".qkv.", f".{x}_proj."): part for x, part in zip("qkv", np.split(fused, 3), strict=True)
        }
    heads: dict[str, dict[int, Array]] = {}
    for name in list(weights):
        if match := HEAD_NAME.fullmatch(name):
            heads.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = weights.pop(name)
    for name, parts in heads.items():
        settings["n_head"] = len(parts)
        if sorted(parts) != list(range(len(parts))) or len({part.shape for part in parts.values()}) > 1:
            raise UserError(f"{path}: heads of {quoted(name)} are missing, or differ in shape")
        weights[name] = np.concatenate([parts[i] for i in range(len(parts))])


def read_positions(weights: dict[str, Array], settings: dict[str, Any], path: Path) -> None:
    """Add `n_ctx` and `learned_positions` to `settings` if a table shows them; remove a table of our sinusoids."""
    if (table := weights.pop("pe", None)) is not None:
        if table.ndim == 3 and 1 in table.shape[:2]:
            table = table.reshape(-1, table.shape[-1])
        width = weights[EMBEDDING].shape[-1] if EMBEDDING in weights else None
        is_ours = table.ndim == 2 and table.shape[1] == width
        if not is_ours or not np.allclose(table, build_sinusoid_table(*table.shape), atol=1e-3):
            raise UserError(f"{path}: its position table `pe` is not the sinusoids of 'Attention Is All You Need'")
        settings.setdefault("n_ctx", len(table))
    if POSITION_EMBEDDING in weights:
        settings |= {"learned_positions": True, "n_ctx": len(weights[POSITION_EMBEDDING])}


def drop_redundant_weights(weights: dict[str, Array], settings: dict[str, Any]) -> None:
    """Remove all-zero biases that our models may lack, and an LM head that equals the embedding; set `tied`."""
    for name in list(weights):
        if re.search(r"([qkv]_proj|lm_head)\.bias$", name) and not weights[name].any():
            del weights[name]
    if LM_HEAD not in weights or np.array_equal(weights[LM_HEAD], weights.get(EMBEDDING, ())):
        weights.pop(LM_HEAD, None)
        settings["tied"] = True


def read_config(
    weights: Mapping[str, Array], settings: Mapping[str, Any], hyperparameters: Mapping[str, Any], path: Path
) -> ModelConfig:
    """Return the config: `settings`, shapes and `hyperparameters`. What nothing records is assumed, with a warning."""
    embedding, up_proj = weights.get(EMBEDDING), weights.get("layers.0.mlp.up_proj.weight")
    if embedding is None or up_proj is None or embedding.ndim != 2 or up_proj.shape[1:] != embedding.shape[1:]:
        raise UserError(
            f"{path} is not a GPT: the embedding or the first block is missing, or their shapes do not match"
        )
    layers = {int(match[1]) for name in weights if (match := re.match(r"layers\.(\d{1,6})\.", name, re.ASCII))}
    if layers != set(range(len(layers))) or len(layers) > MAX_LAYERS:
        raise UserError(f"{path}: blocks are missing: it has {len(layers)}, but the last is number {max(layers)}")
    if "lm_head.bias" in weights:
        raise UserError(f"{path}: its LM head has a bias, which our models do not have; train it without")
    V, C = embedding.shape
    n_head = settings.get("n_head") or get_count(hyperparameters, "n_head")
    if not n_head:
        log.warning("%s does not record it, assuming a head dimension of %d", path, DEFAULT_HEAD_DIM)
    n_ctx = get_count(hyperparameters, "block_size") or settings.get("n_ctx")
    if not n_ctx:
        log.warning("%s does not record it, assuming a context of %d tokens", path, DEFAULT_CONTEXT)
    return ModelConfig(
        architecture="classic",
        vocab_size=V,
        n_ctx=n_ctx or DEFAULT_CONTEXT,
        n_layer=len(layers),
        n_head=n_head or C // DEFAULT_HEAD_DIM or 1,
        n_embd=C,
        n_ff=len(up_proj),
        tied=settings.get("tied", False),
        learned_positions=settings.get("learned_positions", False),
        activation=settings.get("activation", "relu"),
        qkv_bias=any(re.search(r"[qkv]_proj\.bias$", name) for name in weights),
        qk_norm=False,
        norm_eps=1e-5,
    )


def get_count(hyperparameters: Mapping[str, Any], key: str) -> int:
    """Return a positive integer of the hyperparameters; 0 if it is missing or implausible."""
    value = hyperparameters.get(key)
    return value if type(value) is int and 0 < value < MAX_COUNT else 0


PT = Format(name="pt", can_read=can_read, read=read)
