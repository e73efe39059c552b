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

from tinystories.checkpoint import BUNDLED, ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.cpu.fields import BLOCK, GROUP
from tinystories.engine.cpu.packing import pack_int4, pack_int8, padded, rounded_to_int8, unpack_int8
from tinystories.engine.cpu.plan import EMBEDDING, HEAD, POSITIONS
from tinystories.errors import UserError, shown

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Precision = Literal["fp32", "int8", "int4"]
LAYOUT = 2  # of packed files; another number is packed anew
ALIGNMENT = 64
FILLING = ".filling"  # ends the names of what stands between tensors
# What a hostile header may lead to.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
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
        self.header = header
        self.tensors = {name: self.view(**facts) for name, facts in header.items()}

    def view(self, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
        if dtype not in DTYPES:
            raise ValueError(f"it holds numbers of type {dtype}, which are not supported")
        kind = np.dtype(DTYPES[dtype])
        begin, end = data_offsets
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if not 0 <= begin <= end <= len(self.memory) - self.begin or end - begin != count * kind.itemsize:
            raise ValueError("a tensor does not fit the file")
        return np.frombuffer(self.memory, kind, count, self.begin + begin).reshape(shape)

    def digest(self) -> str:
        return digest_of(self.header, self.metadata, memoryview(self.memory)[self.begin :])

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def digest_of(header: Mapping[str, Any], metadata: Mapping[str, str], *parts: Any) -> str:
    """SHA-256 of all that a packed file holds but the digest itself."""
    facts = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([header, facts], sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def opened(path: Path) -> Mapped:
    """`UserError` where the file is no safetensors file."""
    try:
        return Mapped(path)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model."""
    C, F, D = config.n_embd, config.n_ff, config.head_dim
    q, kv = config.n_head * D, config.kv_heads * D
    classic = config.architecture == "classic"
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, C), "norm.weight": (C,)}
    if config.learned_positions:
        shapes[POSITIONS] = (config.n_ctx, C)
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
        for name, outer in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (outer, C)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (outer,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (C, q)
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


def shipped(files: ModelFiles) -> Mapped:
    """The weights of a directory that has none but packed ones, checked. `UserError` where they are damaged."""
    path = files.weights_path
    try:
        found = Mapped(path)
        if found.metadata.get("layout") != str(LAYOUT):
            raise ValueError("its layout is that of another version of this program")
        if found.metadata.get("sha256") != found.digest():
            raise ValueError("it does not match its checksum")
        require_sizes(found, files.config, "int8")
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged ({error}), and there is no other copy of these weights here") from None
    return found


def unpacked(files: ModelFiles) -> Mapping[str, Array]:
    """The same in fp32, by their names in `model.safetensors`."""
    found = shipped(files)
    weights: dict[str, Array] = {}
    for name, shape in expected_shapes(files.config).items():
        if len(shape) == 1 or name == POSITIONS:
            weights[name] = found[name].reshape(shape)
        elif name == EMBEDDING and not files.config.tied:
            rows = found[f"{name}.rows"].reshape(shape).astype(np.float32)
            weights[name] = rows * found[f"{name}.scales"][:, None]
        else:
            weights[name] = np.ascontiguousarray(unpack_int8(found[f"{name}.int8"], found[f"{name}.scales"], *shape))
    return weights


def source_of(files: ModelFiles) -> Mapping[str, Array]:
    """The model's own weights, checked: names, shapes, and that all are finite numbers."""
    if files.is_packed:
        return unpacked(files)
    found, wanted = opened(files.weights_path), expected_shapes(files.config)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise UserError(f"{found.path}: weight {shown(name)} is {'unknown' if name in found else 'missing'}")
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
    if files.is_packed and precision == "int8":
        return shipped(files)
    if files.folder.resolve() == BUNDLED.resolve():  # small, and not a place to write to
        files.check_weights()
        return dict(pack(files, precision))
    path, status = packed_path(files, precision), files.weights_path.stat()
    facts = {"layout": str(LAYOUT), "precision": precision, "source_sha256": files.weights_sha256}
    seen = {"source_bytes": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}
    if path.exists():
        found: Mapped | None = None
        try:
            found = Mapped(path)
            if not facts.items() <= found.metadata.items():
                why = "was made from other weights"
            elif found.metadata.get("sha256") != found.digest():
                why = "is damaged"
            else:
                require_sizes(found, files.config, precision)
                if not seen.items() <= found.metadata.items():  # copied, or weights that config.json does not know
                    files.check_weights()
                return found
        except PermissionError as error:
            why = f"cannot be read ({error})"
        except UNREADABLE as error:
            why = f"is damaged ({error})"
        found = None  # or Windows would not let go of the file
        log.warning("%s %s: packing the weights again", path, why)
    else:
        log.info("packing the weights to %s, once: %s", precision, path)
    files.check_weights()
    tensors = dict(pack(files, precision))
    try:
        write(path, tensors, facts | seen)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start packs again", path, error)
        return tensors
    return Mapped(path)


def packed_sizes(config: ModelConfig, precision: Precision) -> dict[str, tuple[type, int]]:
    """Type and number of elements of each tensor of a packed file: the machine code believes them."""
    sizes: dict[str, tuple[type, int]] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1 or name == POSITIONS:
            sizes[name] = np.float32, int(np.prod(shape))
            continue
        rows, columns = padded(shape[0], BLOCK), padded(shape[1], 8 if precision == "int8" else GROUP)
        if name == EMBEDDING and not config.tied:
            sizes[f"{name}.rows"], sizes[f"{name}.scales"] = (np.int8, shape[0] * shape[1]), (np.float32, shape[0])
        elif precision == "int8":
            sizes[f"{name}.int8"], sizes[f"{name}.scales"] = (np.uint8, rows * columns), (np.float32, rows)
        else:
            sizes[f"{name}.int4"] = np.uint8, rows * columns // 2
            sizes[f"{name}.scales"] = np.uint16, rows * columns // GROUP
    return sizes


def require_sizes(found: Mapping[str, Array], config: ModelConfig, precision: Precision) -> None:
    """`ValueError` unless every tensor is there, as large as it must be, and no other is."""
    sizes = packed_sizes(config, precision)
    for name in found:
        if name not in sizes and not name.endswith(FILLING):
            raise ValueError(f"it holds {name}, of which the model knows nothing")
    for name, (kind, size) in sizes.items():
        if name not in found or found[name].dtype != kind or found[name].size != size:
            raise ValueError(f"{name} is not of the model's size")


def pack(files: ModelFiles, precision: Precision) -> Iterator[tuple[str, Array]]:
    """Every matrix in few bits, everything else as it is."""
    source = source_of(files)
    for name, weight in source.items():
        if weight.ndim == 1 or name == POSITIONS:
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
    offset = 0
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
            header[f"{name}{FILLING}"] = {
                "dtype": "U8",
                "shape": [len(filling)],
                "data_offsets": [offset + len(data), offset + len(data) + len(filling)],
            }
        for part in (data, filling):
            parts.append(part)
        offset += len(data) + len(filling)
    metadata = {**facts, "sha256": digest_of(header, facts, *parts)}
    text = json.dumps(header | {"__metadata__": metadata}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(draft, 0o666 & ~umask)  # as any new file: others may read it
        with os.fdopen(handle, "wb") as file:
            for part in (len(text).to_bytes(8, "little"), text, *parts):
                file.write(part)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
