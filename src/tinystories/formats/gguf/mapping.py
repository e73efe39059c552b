"""Mapping between our weights and llama.cpp's tensors, both ways.

Names differ, `gpt2` has q, k and v fused into one tensor, and `llama` has the rows of q and k in another order.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from tinystories.config import ModelConfig
from tinystories.errors import UserError, quoted
from tinystories.formats.bundle import Array
from tinystories.formats.gguf.reader import GgufFile
from tinystories.formats.rope_layout import permute_rope, unpermute_rope
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING, check_weights, expected_shapes

TOP_NAMES = {
    EMBEDDING: "token_embd.weight",
    POSITION_EMBEDDING: "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    LM_HEAD: "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED_QKV_NAMES = {f"self_attn.{name}_proj": "attn_qkv" for name in "qkv"}  # in gpt2
QKV_BIAS_NAME = "blk.{}.attn_qkv.bias"


def build_tensor_map(config: ModelConfig) -> dict[str, list[str]]:
    """Map each llama.cpp tensor to the names of our weights that are concatenated (axis 0) to it.

    An empty list is a tensor of zeros: the qkv bias that `gpt2` has and the model lacks.
    """
    is_classic = config.architecture == "classic"
    tensor_map: dict[str, list[str]] = {}
    if is_classic and not config.qkv_bias:
        tensor_map |= {QKV_BIAS_NAME.format(i): [] for i in range(config.n_layer)}
    for name in expected_shapes(config):
        gguf_name = TOP_NAMES.get(name)
        if gguf_name is None:
            _, layer, rest = name.split(".", 2)
            stem, suffix = rest.rsplit(".", 1)
            gguf_name = f"blk.{layer}.{(LAYER_NAMES | FUSED_QKV_NAMES if is_classic else LAYER_NAMES)[stem]}.{suffix}"
        tensor_map.setdefault(gguf_name, []).append(name)
    return tensor_map


def to_gguf_tensors(config: ModelConfig, weights: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield llama.cpp's names and fp32 tensors."""
    for gguf_name, names in build_tensor_map(config).items():
        parts = [np.ascontiguousarray(weights[name], np.float32) for name in names]
        if is_rope_permuted(config, names):
            parts = [permute_rope(part, config.head_dim) for part in parts]
        yield gguf_name, np.concatenate(parts) if parts else np.zeros(3 * config.n_embd, np.float32)


def from_gguf_tensors(file: GgufFile, config: ModelConfig) -> dict[str, Array]:
    """Return our fp32 weights by name. `UserError` if a tensor is missing, unknown, or has a wrong shape."""
    tensor_map = build_tensor_map(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for gguf_name, info in file.tensors.items():
        if gguf_name not in tensor_map:
            raise UserError(f"{file.path}: tensor {quoted(gguf_name)} is unknown: our architectures do not have it")
        names = tensor_map[gguf_name]
        rows, rest = divmod(info.shape[0], len(names) or 1)
        shapes |= dict.fromkeys(names, info.shape if rest else (rows, *info.shape[1:]))
    check_weights(shapes, config, str(file.path))
    weights: dict[str, Array] = {}
    for gguf_name, names in tensor_map.items():
        if names:
            weight = file.load_tensor(gguf_name)
            weight = unpermute_rope(weight, config.head_dim) if is_rope_permuted(config, names) else weight
            weights |= zip(names, np.split(weight, len(names)), strict=True)
    return weights


def is_rope_permuted(config: ModelConfig, names: list[str]) -> bool:
    """Return whether GGUF has the rows of this weight in another order than ours.

    For RoPE, `llama` rotates adjacent pairs (2i, 2i + 1); `qwen3` rotates halves (i, i + D / 2), as we do.
    """
    is_modern = config.architecture == "modern"
    return is_modern and not config.qk_norm and names[0].endswith(("q_proj.weight", "k_proj.weight"))


def select_tensor_type(config: ModelConfig, gguf_name: str, shape: tuple[int, ...], precision: str) -> str:
    """Return the GGML type of a tensor, chosen as llama.cpp's quantizer would.

    Vectors and position embeddings stay in F32. Matrices whose rows are not a multiple of 32 stay in F16. In q4_0 the
    LM head (if tied, the embedding) has 8 bits. The one difference: llama.cpp gives the head 6 bits if rows are a
    multiple of 256, a type that the `gguf` package cannot write.
    """
    if precision == "f32" or len(shape) == 1 or gguf_name == TOP_NAMES[POSITION_EMBEDDING]:
        return "F32"
    if precision == "f16" or shape[1] % 32:
        return "F16"
    if gguf_name == TOP_NAMES[EMBEDDING if config.tied else LM_HEAD]:
        return "Q8_0"
    return precision.upper()
