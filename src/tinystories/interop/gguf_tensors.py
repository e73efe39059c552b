"""Our weights as llama.cpp's tensors, and back: other names, q, k and v as one, rows in another order."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu.plan import EMBEDDING, HEAD, POSITIONS
from tinystories.engine.cpu.weights import expected_shapes
from tinystories.errors import UserError, shown
from tinystories.interop.gguf_file import GgufFile
from tinystories.interop.llama2c import halved, interleaved

Array = npt.NDArray[Any]

TOP = {
    EMBEDDING: "token_embd.weight",
    POSITIONS: "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    HEAD: "output.weight",
}
LAYER = {
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
ONE = {f"self_attn.{name}_proj": "attn_qkv" for name in "qkv"}  # in gpt2
QKV_BIAS = "blk.{}.attn_qkv.bias"


def sources(config: ModelConfig) -> dict[str, list[str]]:
    """Of each of llama.cpp's tensors the weights that make it, one under another; none: zeros."""
    classic = config.architecture == "classic"
    found: dict[str, list[str]] = {}
    if classic and not config.qkv_bias:
        found |= {QKV_BIAS.format(i): [] for i in range(config.n_layer)}
    for name in expected_shapes(config):
        theirs = TOP.get(name)
        if theirs is None:
            _, layer, rest = name.split(".", 2)
            stem, kind = rest.rsplit(".", 1)
            theirs = f"blk.{layer}.{(LAYER | ONE if classic else LAYER)[stem]}.{kind}"
        found.setdefault(theirs, []).append(name)
    return found


def tensors_of(config: ModelConfig, weights: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """llama.cpp's names and tensors, fp32."""
    for theirs, ours in sources(config).items():
        parts = [np.ascontiguousarray(weights[name], np.float32) for name in ours]
        if is_rotated(config, ours):
            parts = [interleaved(part, config.head_dim) for part in parts]
        yield theirs, np.concatenate(parts) if parts else np.zeros(3 * config.n_embd, np.float32)


def weights_of(file: GgufFile, config: ModelConfig) -> dict[str, Array]:
    """Our names and weights, fp32. `UserError` where a tensor is missing, unknown, or of another shape."""
    shapes, tensors = expected_shapes(config), sources(config)
    if unknown := file.tensors.keys() - tensors.keys():
        raise UserError(f"tensor {shown(min(unknown))} has no place in our architectures")
    weights: dict[str, Array] = {}
    for theirs, ours in tensors.items():
        if not ours:
            continue
        if theirs not in file.tensors:
            raise UserError(f"tensor {theirs!r} is missing; convert the model again")
        rows = [shapes[name][0] for name in ours]
        wanted = (sum(rows), *shapes[ours[0]][1:])
        if file.tensors[theirs].shape != wanted:
            raise UserError(f"tensor {theirs!r} is {file.tensors[theirs].shape}, not {wanted}")
        weight = file.weight(theirs)
        if is_rotated(config, ours):
            weight = halved(weight, config.head_dim)
        weights |= zip(ours, np.split(weight, np.cumsum(rows)[:-1]), strict=True)
    return weights


def is_rotated(config: ModelConfig, names: list[str]) -> bool:
    """Whether rows stand in another order in the file: `llama` rotates neighbours, `qwen3` halves as we do."""
    modern = config.architecture == "modern"
    return modern and not config.qk_norm and names[0].endswith(("q_proj.weight", "k_proj.weight"))


def kind_of(config: ModelConfig, theirs: str, shape: tuple[int, ...], precision: str) -> str:
    """Type of a tensor, as llama.cpp's quantiser chooses it.

    Vectors and positions stay in f32. Rows that are no whole blocks of 32 stay in f16. In q4_0 the head (tied: the
    embedding) has 8 bits; llama.cpp gives it 6 where rows are whole blocks of 256, which the `gguf` package cannot
    write.
    """
    if precision == "f32" or len(shape) == 1 or theirs == TOP[POSITIONS]:
        return "F32"
    if precision == "f16" or shape[1] % 32:
        return "F16"
    if theirs == TOP[EMBEDDING if config.tied else HEAD]:
        return "Q8_0"
    return precision.upper()
