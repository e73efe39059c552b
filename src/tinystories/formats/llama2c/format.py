"""Read and write llama2.c checkpoints and tokenizer.bin (export.py and tokenizer.py of karpathy/llama2.c).

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
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import MAX_LAYERS, ModelBundle
from tinystories.formats.llama2c.reference import logits as logits  # re-exported: how an export is verified
from tinystories.formats.rope_layout import permute_rope, unpermute_rope
from tinystories.formats.tokenizer_conversion import (
    BYTE_PIECES,
    MAX_PIECE_CHARS,
    build_sentencepiece_bpe,
    extract_pieces,
    permute_ids,
    set_end_token,
)
from tinystories.weights.names import expected_shapes

Array = npt.NDArray[Any]

MAGIC = 0x616B3432
SIZES_STRUCT = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
HEADER_BYTES = 256  # in versions 1 and 2
GROUP_SIZE = 64  # int8 weights per scale, unless the widths of the model are not multiples of it
MAX_COUNT = 2**24  # largest plausible number in the header
BOS_ID = 1  # run.c begins with this token and stops at it
FIRST_BYTE_ID = 3  # id of the piece <0x00>; run.c hard-codes it
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


def total_bytes(config: ModelConfig, version: int, group_size: int) -> int:
    """Return the size of all tensors in the file, computed without enumerating them.

    The sizes come from an unchecked header, which may claim millions of layers.
    """
    if not group_size:
        return 4 * (config.n_params + (config.n_ctx * config.head_dim if version == 0 else 0))
    norms = config.n_embd * (2 * config.n_layer + 1)
    return 4 * norms + tensor_bytes((1, config.n_params - norms), group_size)


def tensor_bytes(shape: tuple[int, ...], group_size: int) -> int:
    """Return the size of one tensor in the file; matrices are int8 with a scale per `group_size` weights (0: fp32)."""
    count = math.prod(shape)
    return count + 4 * (count // group_size) if group_size and len(shape) == 2 else 4 * count


def write(model: ModelBundle, path: Path, precision: str) -> Array:
    """Write the checkpoint X.bin, X.tokenizer.bin, and X.tokenizer.json if the former cannot express the tokenizer.

    Return the id permutation, file id = permutation[our id]: run.c requires END to be 1 and bytes to be 3 to 258.
    `UserError` if llama2.c does not support the model.
    """
    config = model.config
    check_supported(config)
    pieces, scores = extract_pieces(model.tokenizer)
    pieces += [b"<unk>"] * (config.vocab_size - len(pieces))
    scores += [0.0] * (config.vocab_size - len(scores))
    id_permutation = build_id_permutation(pieces, model.tokenizer.end_id)
    inverse_permutation = np.argsort(id_permutation)
    pieces_file, tokenizer_file = sidecars(path)
    with pieces_file.open("wb") as file:
        write_tokenizer_bin(
            [b"\n<s>\n" if i == BOS_ID else canonical_piece(pieces[k]) for i, k in enumerate(inverse_permutation)],
            scores,
            inverse_permutation,
            file,
        )
    if model.tokenizer.is_lossless or (id_permutation != np.arange(len(id_permutation))).any():
        permute_ids(model.tokenizer, id_permutation.tolist()).save(tokenizer_file)
    version = 0 if precision == "f32" else 2
    with path.open("wb") as file:
        group_size = write_header(config, version, file)
        for name, shape in iter_tensors(config, version):
            weight = build_rope_table(shape) if name == "rope" else np.asarray(model.weights[name], np.float32)
            if name in ("embed_tokens.weight", "lm_head.weight"):
                weight = weight[inverse_permutation]
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = permute_rope(weight, config.head_dim)
            if group_size and weight.ndim == 2:
                for part in quantize_q80(weight, group_size):
                    file.write(part.tobytes())
            else:
                file.write(weight.astype("<f4").tobytes())
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
    required_values = {"architecture": "modern", "qk_norm": False, "norm_eps": 1e-5, "rope_base": 10000.0}
    mismatches = {name: value for name, value in required_values.items() if getattr(config, name) != value}
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
    sign = -1 if version == 0 and not config.tied else 1
    sizes = SIZES_STRUCT.pack(
        *(config.n_embd, config.n_ff, config.n_layer, config.n_head, config.kv_heads),
        *(sign * config.vocab_size, config.n_ctx),
    )
    if version == 0:
        file.write(sizes)
        return 0
    group_size = math.gcd(
        GROUP_SIZE, config.n_embd, config.n_ff
    )  # runq.c drops the rest of a row that is not whole groups
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


def quantize_q80(weight: Array, group_size: int) -> tuple[Array, Array]:
    """Quantize to int8 in -127..127; return (groups, group_size) values and fp32 scales, as export.py does."""
    groups = weight.reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1).astype("<f4") / np.float32(127)
    nonzero_scales = np.where(scales > 0, scales, np.float32(1))
    return np.rint(groups / nonzero_scales[:, None]).astype(np.int8), scales


def build_id_permutation(pieces: list[bytes], end_id: int) -> Array:
    """Return the file id of each of our ids.

    END becomes BOS_ID and the piece of each byte gets its fixed id; the other ids fill the gaps in order.
    """
    piece_ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    fixed_ids = {BOS_ID: end_id}
    for byte, name in enumerate(BYTE_PIECES):
        our_id = piece_ids.get(name.encode(), piece_ids.get(bytes([byte])))
        if our_id is not None and FIRST_BYTE_ID + byte < len(pieces) and our_id not in fixed_ids.values():
            fixed_ids[FIRST_BYTE_ID + byte] = our_id
    used_ids = set(fixed_ids.values())
    remaining_ids = iter([i for i in range(len(pieces)) if i not in used_ids])
    inverse_permutation = [fixed_ids[i] if i in fixed_ids else next(remaining_ids) for i in range(len(pieces))]
    return np.argsort(inverse_permutation)


def canonical_piece(piece: bytes) -> bytes:
    """Return the piece as llama2.c's tokenizer.py writes it: EOS with newlines around it."""
    return b"\n</s>\n" if piece == b"</s>" else piece


def write_tokenizer_bin(pieces: list[bytes], scores: list[float], inverse_permutation: Array, file: BinaryIO) -> None:
    """Write `pieces`, in file order, with their `scores`, in our order."""
    file.write(struct.pack("<i", max(map(len, pieces))))
    for piece, our_id in zip(pieces, inverse_permutation, strict=True):
        file.write(struct.pack("<fi", scores[our_id], len(piece)) + piece)


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a checkpoint of version 0, 1 or 2.

    `tokenizer`: a tokenizer.bin or tokenizer.json; by default the one that `write` put beside the file. `UserError` if
    the file is not a checkpoint or its length does not match its header.
    """
    try:
        with path.open("rb") as file:
            config, version, group_size, offset = parse_header(file.read(HEADER_BYTES), path)
        length = path.stat().st_size
        expected_length = offset + total_bytes(config, version, group_size)
        if length != expected_length:
            raise UserError(f"{path} has {length:,} bytes, but its header implies {expected_length:,}; copy it again")
        file_bytes = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    weights: dict[str, Array] = {}
    for name, shape in iter_tensors(config, version):
        n_bytes = tensor_bytes(shape, group_size)
        weight = dequantize(file_bytes[offset : offset + n_bytes], shape, group_size)
        offset += n_bytes
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = unpermute_rope(weight, config.head_dim)
        if name != "rope":
            weights[name] = weight
    provenance = {"imported_from": path.name, "format": f"llama2.c version {version}"}
    loaded_tokenizer = read_tokenizer(tokenizer or find_sidecar(path), config.vocab_size)
    return ModelBundle(config=config, weights=weights, tokenizer=loaded_tokenizer, provenance=provenance)


def dequantize(data: Array, shape: tuple[int, ...], group_size: int) -> Array:
    """Return the fp32 tensor stored in the bytes `data`: int8 values, then their scales (`group_size` 0: fp32)."""
    if not group_size or len(shape) == 1:
        return data.view("<f4").reshape(shape)
    count = math.prod(shape)
    with np.errstate(invalid="ignore", over="ignore"):  # damaged scales; ModelBundle.check rejects the result
        values = data[:count].view(np.int8).reshape(-1, group_size) * data[count:].view("<f4")[:, None]
    return values.reshape(shape)


def parse_header(header: bytes, path: Path) -> tuple[ModelConfig, int, int, int]:
    """Return (config, version, int8 weights per scale or 0 for fp32, offset of the weights)."""
    version, group_size, offset, tied = 0, 0, SIZES_STRUCT.size, True
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
    config = ModelConfig(
        architecture="modern",
        n_embd=C,
        n_ff=F,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head if n_kv_head < n_head else 0,
        vocab_size=V,
        n_ctx=T,
        tied=bool(tied),
        qk_norm=False,
        norm_eps=1e-5,
        rope_base=10000.0,
    )
    return config, version, group_size, offset


def find_sidecar(path: Path) -> Path:
    """Return the tokenizer beside a checkpoint: X.tokenizer.json, else X.tokenizer.bin."""
    for file in reversed(sidecars(path)):
        if file.is_file():
            return file
    raise UserError(f"{path} has no tokenizer beside it; pass llama2.c's tokenizer.bin with --tokenizer")


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.bin with `vocab_size` pieces, or a tokenizer.json.

    BOS becomes END, because it separates stories in llama2.c's training data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror or error}") from None
    if data[:1] == b"{":
        try:
            return set_end_token(data.decode(), BOS_ID, str(path))
        except UnicodeDecodeError:
            raise UserError(f"tokenizer {path} is not UTF-8 text") from None
    pieces, scores = parse_tokenizer_bin(data, vocab_size, path)
    return build_sentencepiece_bpe([piece.strip(b"\n") or piece for piece in pieces], scores, BOS_ID, where=str(path))


def parse_tokenizer_bin(data: bytes, vocab_size: int, path: Path) -> tuple[list[bytes], list[float]]:
    """Return pieces and scores; `UserError` unless there are exactly `vocab_size` pieces."""
    pieces: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data) and len(pieces) < vocab_size:
        if offset + 8 > len(data):
            raise UserError(f"tokenizer {path} ends inside piece {len(pieces)}; copy it again")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 < length <= 4 * MAX_PIECE_CHARS or offset + length > len(data):
            raise UserError(f"tokenizer {path} is damaged: piece {len(pieces)} has {length:,} bytes; copy it again")
        pieces.append(data[offset : offset + length])
        scores.append(score)
        offset += length
    if offset != len(data) or len(pieces) != vocab_size:
        more = "more" if len(pieces) == vocab_size else f"only {len(pieces):,}"
        raise UserError(f"tokenizer {path} has {more} pieces, the model {vocab_size:,}; pass the model's own tokenizer")
    return pieces, scores
