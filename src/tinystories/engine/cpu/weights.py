"""A model's weights in memory without a copy: `model.safetensors` itself, or a packed file made from it.

A packed file is a safetensors file as well. Its metadata say what it was made from and the SHA-256 of its tensors.
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.cpu.packing import pack_int4, pack_int8, rounded_to_int8
from tinystories.engine.cpu.plan import EMBEDDING, HEAD
from tinystories.errors import UserError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Precision = Literal["fp32", "int8", "int4"]
LAYOUT = 1  # of packed files; another number is packed anew
ALIGNMENT = 64
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Mapped(Mapping[str, Array]):
    """The tensors of a safetensors file, mapped and read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self.memory[:8], "little")
        if not 2 <= size <= len(self.memory) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(self.memory[8 : 8 + size])
        self.begin = 8 + size
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors = {name: self.view(**facts) for name, facts in header.items()}

    def view(self, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
        kind = np.dtype(DTYPES[dtype])
        begin, end = data_offsets
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if not 0 <= begin <= end <= len(self.memory) - self.begin or end - begin != count * kind.itemsize:
            raise ValueError("a tensor does not fit the file")
        return np.frombuffer(self.memory, kind, count, self.begin + begin).reshape(shape)

    def digest(self) -> str:
        return hashlib.sha256(memoryview(self.memory)[self.begin :]).hexdigest()

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def opened(path: Path) -> Mapped:
    """`UserError` where the file is no safetensors file."""
    try:
        return Mapped(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model."""
    C, F, D = config.n_embd, config.n_ff, config.head_dim
    classic = config.architecture == "classic"
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, C), "norm.weight": (C,)}
    if classic:
        shapes["norm.bias"] = (C,)
    if not config.tied:
        shapes[HEAD] = (config.vocab_size, C)
    for i in range(config.n_layer):
        layer = f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (C,)
            if classic:
                shapes[f"{layer}{norm}.bias"] = (C,)
        for name, outer in (("q", C), ("k", config.kv_heads * D), ("v", config.kv_heads * D), ("o", C)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (outer, C)
        for name, shape in (("up", (F, C)), ("down", (C, F))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        if classic:
            shapes[f"{layer}self_attn.o_proj.bias"] = (C,)
            shapes[f"{layer}mlp.up_proj.bias"], shapes[f"{layer}mlp.down_proj.bias"] = (F,), (C,)
        else:
            shapes[f"{layer}mlp.gate_proj.weight"] = (F, C)
            if config.qk_norm:
                shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (D,)
    return shapes


def source_of(files: ModelFiles) -> Mapped:
    """The model's own weights, checked: names, shapes, and that all are finite numbers."""
    found, wanted = opened(files.weights_path), expected_shapes(files.config)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise UserError(f"{found.path}: weight {name} is {'unknown' if name in found else 'missing'}")
        if found[name].shape != wanted[name]:
            raise UserError(f"{found.path}: {name} is {found[name].shape}, not {wanted[name]}")
        if found[name].dtype != np.float32:
            raise UserError(f"{found.path}: {name} is {found[name].dtype}, not fp32")
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(found[name].sum(dtype=np.float64))
        if not finite:
            raise UserError(f"{found.path}: {name} holds numbers that are not finite; use another checkpoint")
    return found


def packed_path(files: ModelFiles, precision: Precision) -> Path:
    return files.folder / f"packed-{precision}.safetensors"


def packed(files: ModelFiles, precision: Precision) -> Mapping[str, Array]:
    """Packed weights: from the file beside the model where it is whole and of these weights, else made now.

    The model's own weights are only read again when their file has changed, in size, date, or by config.json.
    """
    path, source = packed_path(files, precision), files.weights_path.stat()
    facts = {
        "layout": str(LAYOUT),
        "precision": precision,
        "source_sha256": files.weights_sha256,
        "source_bytes": str(source.st_size),
        "source_mtime_ns": str(source.st_mtime_ns),
    }
    if path.exists():
        try:
            found = Mapped(path)
            if not facts.items() <= found.metadata.items():
                why = "was made from other weights"
            elif found.metadata.get("sha256") != found.digest():
                why = "is damaged"
            else:
                return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"is damaged ({error})"
        log.warning("%s %s: packing the weights again", path, why)
    else:
        log.info("packing the weights to %s, once: %s", precision, path)
    files.check_weights()
    tensors = dict(pack(files, precision))
    try:
        write(path, tensors, facts)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start packs again", path, error)
        return tensors
    return Mapped(path)


def pack(files: ModelFiles, precision: Precision) -> Iterator[tuple[str, Array]]:
    """Every matrix in few bits, everything else as it is."""
    source = source_of(files)
    for name, weight in source.items():
        if weight.ndim == 1:
            yield name, weight
        elif name == EMBEDDING and not files.config.tied:
            values, scales = rounded_to_int8(weight)
            yield from ((f"{name}.rows", values), (f"{name}.scales", scales))
        elif precision == "int4":
            blocks, bits = pack_int4(weight)
            yield from ((f"{name}.int4", blocks), (f"{name}.scales", bits))
        else:
            blocks, scales = pack_int8(weight)
            yield from ((f"{name}.int8", blocks), (f"{name}.scales", scales))


def write(path: Path, tensors: Mapping[str, Array], facts: Mapping[str, str]) -> None:
    """A safetensors file whose tensors begin at multiples of 64 bytes; whole or not at all."""
    header: dict[str, Any] = {}
    offset, digest = 0, hashlib.sha256()
    parts: list[bytes | memoryview] = []
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        filling = bytes(-len(data) % ALIGNMENT)
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        if filling:  # safetensors allows no holes
            header[f"{name}.filling"] = {
                "dtype": "U8",
                "shape": [len(filling)],
                "data_offsets": [offset + len(data), offset + len(data) + len(filling)],
            }
        for part in (data, filling):
            digest.update(part)
            parts.append(part)
        offset += len(data) + len(filling)
    header["__metadata__"] = {**facts, "sha256": digest.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (len(text).to_bytes(8, "little"), text, *parts):
                file.write(part)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
