"""Read and write llama2.c checkpoints (export.py of karpathy/llama2.c).

Versions: 0 ("legacy", read by run.c), 1 (the same numbers in another order) and 2 (int8, read by runq.c). llama2.c's
RoPE rotates adjacent pairs (2i, 2i + 1) of a head, ours rotates (i, i + D / 2), so the rows of q and k are permuted.
"""

import math
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinystories.config import ModelConfig
from tinystories.errors import UserError
from tinystories.formats.bundle import MAX_LAYERS, Array, ModelBundle
from tinystories.formats.llama2c.reference import logits
from tinystories.formats.llama2c.tokenizer import read_tokenizer, write_tokenizer
from tinystories.formats.protocol import Format
from tinystories.formats.rope_layout import permute_rope, unpermute_rope
from tinystories.weights.names import expected_shapes

MAGIC = 0x616B3432
SIZES_STRUCT = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
HEADER_BYTES = 256  # in versions 1 and 2
GROUP_SIZE = 64  # int8 weights per scale, unless the widths of the model are not multiples of it
MAX_COUNT = 2**24  # largest plausible number in the header
REQUIRED_SETTINGS: dict[str, Any] = {
    "architecture": "modern",
    "qk_norm": False,
    "norm_eps": 1e-5,
    "rope_base": 10000.0,
}
NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FEED_FORWARD = tuple(f"mlp.{name}_proj" for name in ("gate", "down", "up"))  # w1, w2, w3
# Order of the tensors in the file, by version. A per-layer entry stands for that tensor of all layers in turn.
TENSOR_ORDER = {
    0: ("embed_tokens", NORMS[0], *ATTENTION, NORMS[1], *FEED_FORWARD, "norm", "rope", "lm_head"),
    1: (*NORMS, "norm", "embed_tokens", *ATTENTION, *FEED_FORWARD, "lm_head"),
    2: (*NORMS, "norm", "embed_tokens", *ATTENTION, *FEED_FORWARD, "lm_head"),
}


def iter_tensors(config: ModelConfig, version: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes in file order; "rope" is the table of cosines and sines, which run.c skips."""
    shapes = expected_shapes(config)
    for part in TENSOR_ORDER[version]:
        if part == "rope":
            yield "rope", (2, config.n_ctx, config.head_dim // 2)
        elif f"{part}.weight" in shapes:
            yield f"{part}.weight", shapes[f"{part}.weight"]
        elif part != "lm_head":
            for i in range(config.n_layer):
                yield f"layers.{i}.{part}.weight", shapes[f"layers.{i}.{part}.weight"]


def tensor_bytes(shape: tuple[int, ...], group_size: int) -> int:
    """Return the size of one tensor in the file; matrices are int8 with a scale per `group_size` weights (0: fp32)."""
    count = math.prod(shape)
    return count + 4 * (count // group_size) if group_size and len(shape) == 2 else 4 * count


def write(model: ModelBundle, path: Path, precision: str) -> Array:
    """Write the checkpoint X.bin with its tokenizer, X.tokenizer.bin and perhaps X.tokenizer.json.

    Return the id permutation (see `write_tokenizer`). `UserError` if llama2.c does not support the model.
    """
    config = model.config
    check_supported(config)
    id_permutation = write_tokenizer(model.tokenizer, config.vocab_size, *sidecars(path))
    version = 0 if precision == "f32" else 2
    with path.open("wb") as file:
        group_size = write_header(config, version, file)
        for name, shape in iter_tensors(config, version):
            weight = build_rope_table(shape) if name == "rope" else np.asarray(model.weights[name], np.float32)
            if name in ("embed_tokens.weight", "lm_head.weight"):
                weight = weight[np.argsort(id_permutation)]
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = permute_rope(weight, config.head_dim)
            parts = quantize_q80(weight, group_size) if group_size and weight.ndim == 2 else [weight.astype("<f4")]
            for part in parts:
                file.write(part.tobytes())
    return id_permutation


def sidecars(path: Path) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in (".tokenizer.bin", ".tokenizer.json")]


def next_steps(path: Path) -> str:
    file, tokenizer_path = shlex.quote(str(path)), shlex.quote(str(sidecars(path)[0]))
    return (
        f'next, in llama2.c: ./run {file} -z {tokenizer_path} -i "Once upon a time" (q8_0: ./runq)\n'
        "how run.c reads prompts with a tokenizer of gpt2 or bpe:N is in docs/interop.md"
    )


def check_supported(config: ModelConfig) -> None:
    """Raise a `UserError` that names every setting that llama2.c does not support."""
    mismatches = {name: value for name, value in REQUIRED_SETTINGS.items() if getattr(config, name) != value}
    if config.architecture == "classic":
        mismatches = {"architecture": "modern", "qk_norm": False}
    if config.head_dim * config.n_head != config.n_embd:
        mismatches["head_size"] = 0
    if mismatches:
        flags = " ".join(f"--model.{name} {str(value).lower()}" for name, value in mismatches.items())
        raise UserError(f"llama2.c does not support this model; train one with: tinystories train {flags}")


def write_header(config: ModelConfig, version: int, file: BinaryIO) -> int:
    """Write the header and return the number of int8 weights per scale (0: fp32)."""
    # Version 0 marks an untied classifier with a negative vocab_size.
    vocab_size = -config.vocab_size if version == 0 and not config.tied else config.vocab_size
    heads = config.n_head, config.kv_heads
    sizes = SIZES_STRUCT.pack(config.n_embd, config.n_ff, config.n_layer, *heads, vocab_size, config.n_ctx)
    if version == 0:
        file.write(sizes)
        return 0
    group_size = math.gcd(GROUP_SIZE, config.n_embd, config.n_ff)  # runq.c drops what is left of a row
    header = struct.pack("<Ii", MAGIC, version) + sizes + struct.pack("<?i", config.tied, group_size)
    file.write(header.ljust(HEADER_BYTES, b"\0"))
    return group_size


def build_rope_table(shape: tuple[int, ...]) -> Array:
    """Return the (2, T, D / 2) table of cosines and sines, which run.c skips.

    With torch installed the bytes equal those of export.py; NumPy differs in the last bit.
    """
    _, T, half = shape
    exponents = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    angles = np.outer(np.arange(T, dtype=np.float32), np.float32(1) / np.float32(10000) ** exponents)
    try:
        import torch
    except ImportError:
        return np.stack([np.cos(angles), np.sin(angles)])
    torch_angles = torch.from_numpy(angles)
    return torch.stack([torch_angles.cos(), torch_angles.sin()]).numpy()


def quantize_q80(weight: Array, group_size: int) -> list[Array]:
    """Quantize to int8 in -127..127; return (groups, group_size) values and fp32 scales, as export.py does."""
    groups = weight.reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1).astype("<f4") / np.float32(127)
    nonzero_scales = np.where(scales > 0, scales, np.float32(1))
    return [np.rint(groups / nonzero_scales[:, None]).astype(np.int8), scales]


def can_read(path: Path) -> bool:
    return path.is_file() and path.suffix == ".bin"


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a checkpoint of version 0, 1 or 2.

    `tokenizer`: a tokenizer.bin or tokenizer.json; by default the one that `write` put beside the file. `UserError` if
    the file is not a checkpoint or its length does not match its header.
    """
    with path.open("rb") as file:
        config, version, group_size, offset = read_config(file.read(HEADER_BYTES), path)
    length = path.stat().st_size
    expected_length = offset + sum(tensor_bytes(shape, group_size) for _, shape in iter_tensors(config, version))
    if length != expected_length:
        raise UserError(f"{path} has {length:,} bytes, but its header implies {expected_length:,}; copy it again")
    tokenizer = tokenizer or next((file for file in reversed(sidecars(path)) if file.is_file()), None)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer beside it; pass llama2.c's tokenizer.bin with --tokenizer")
    file_bytes = np.asarray(np.memmap(path, np.uint8, "r"))
    weights: dict[str, Array] = {}
    for name, shape in iter_tensors(config, version):
        n_bytes = tensor_bytes(shape, group_size)
        weight = dequantize(file_bytes[offset : offset + n_bytes], shape, group_size)
        offset += n_bytes
        if name != "rope":
            is_permuted = name.endswith(("q_proj.weight", "k_proj.weight"))
            weights[name] = unpermute_rope(weight, config.head_dim) if is_permuted else weight
    return ModelBundle(
        config=config,
        weights=weights,
        tokenizer=read_tokenizer(tokenizer, config.vocab_size),
        provenance={"imported_from": path.name, "format": f"llama2.c version {version}"},
    )


def dequantize(data: Array, shape: tuple[int, ...], group_size: int) -> Array:
    """Return the fp32 tensor stored in the bytes `data`: int8 values, then their scales (`group_size` 0: fp32)."""
    if not group_size or len(shape) == 1:
        return data.view("<f4").reshape(shape)
    count = math.prod(shape)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales; ModelBundle.check rejects the result
        values = data[:count].view(np.int8).reshape(-1, group_size) * data[count:].view("<f4")[:, None]
    return values.reshape(shape)


def read_config(header: bytes, path: Path) -> tuple[ModelConfig, int, int, int]:
    """Return (config, version, int8 weights per scale or 0 for fp32, offset of the weights)."""
    version, group_size, offset = 0, 0, SIZES_STRUCT.size
    try:
        if struct.unpack_from("<I", header)[0] == MAGIC:
            version, *sizes = struct.unpack_from("<8i", header, 4)
            if version not in (1, 2):
                raise UserError(f"{path} has llama2.c version {version}; only 0, 1 and 2 are supported")
            tied, group_size = header[36] != 0, struct.unpack_from("<i", header, 37)[0] if version == 2 else 0
            offset = HEADER_BYTES
        else:
            sizes = list(SIZES_STRUCT.unpack_from(header))
            tied, sizes[5] = sizes[5] > 0, abs(sizes[5])
    except (struct.error, IndexError):
        raise UserError(f"{path} is too short for a llama2.c checkpoint") from None
    C, F, n_layer, n_head, n_kv_head, V, T = sizes
    is_plausible = all(0 < size <= MAX_COUNT for size in sizes) and n_layer <= MAX_LAYERS
    if not is_plausible or C % n_head or n_head % n_kv_head or C // n_head % 2:
        raise UserError(f"{path} is not a llama2.c checkpoint: its header says {', '.join(map(str, sizes))}")
    if version == 2 and (group_size <= 0 or C % group_size):
        raise UserError(f"{path}: group size {group_size} does not divide the width of its matrices, {C}")
    grouped = {"n_kv_head": n_kv_head} if n_kv_head < n_head else {}
    sizes_by_name = {
        "n_embd": C,
        "n_ff": F,
        "n_layer": n_layer,
        "n_head": n_head,
        "vocab_size": V,
        "n_ctx": T,
    } | grouped
    return ModelConfig(tied=tied, **sizes_by_name, **REQUIRED_SETTINGS), version, group_size, offset


LLAMA2C = Format(
    name="llama2c",
    can_read=can_read,
    read=read,
    write=write,
    logits=logits,
    max_divergence={"f32": 0, "q8_0": 0.01},
    sidecars=sidecars,
    next_steps=next_steps,
)
