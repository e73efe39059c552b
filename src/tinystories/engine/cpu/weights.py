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

from tinystories.checkpoint import BUNDLED_MODEL, ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.cpu.layout import BLOCK_ROWS, GROUP_SIZE
from tinystories.engine.cpu.quantize import dequantize_int8, quantize_int4, quantize_int8, round_to_int8, round_up
from tinystories.engine.cpu.runtime import EMBEDDING, LM_HEAD, POSITION_EMBEDDING
from tinystories.errors import UserError, quoted

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Precision = Literal["fp32", "int8", "int4"]
FORMAT_VERSION = 2  # of packed files; another number is packed anew
ALIGNMENT = 64
PADDING = ".filling"  # ends the names of what stands between tensors
# What a hostile header may lead to.
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile(Mapping[str, Array]):
    """The tensors of a safetensors file, mapped and read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header_size = int.from_bytes(self.buffer[:8], "little")
        if not 2 <= header_size <= len(self.buffer) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(self.buffer[8 : 8 + header_size])
        self.data_start = 8 + header_size
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.header = header
        self.tensors = {name: self.view(**entry) for name, entry in header.items()}

    def view(self, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
        if dtype not in DTYPES:
            raise ValueError(f"it holds numbers of type {dtype}, which are not supported")
        np_dtype = np.dtype(DTYPES[dtype])
        begin, end = data_offsets
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if not 0 <= begin <= end <= len(self.buffer) - self.data_start or end - begin != count * np_dtype.itemsize:
            raise ValueError("a tensor does not fit the file")
        return np.frombuffer(self.buffer, np_dtype, count, self.data_start + begin).reshape(shape)

    def digest(self) -> str:
        return compute_digest(self.header, self.metadata, memoryview(self.buffer)[self.data_start :])

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def compute_digest(header: Mapping[str, Any], metadata: Mapping[str, str], *parts: Any) -> str:
    """SHA-256 of all that a packed file holds but the digest itself."""
    hashed_metadata = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([header, hashed_metadata], sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def open_safetensors(path: Path) -> SafetensorsFile:
    """`UserError` where the file is no safetensors file."""
    try:
        return SafetensorsFile(path)
    except PARSE_ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a model."""
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


def load_int8_only(files: ModelFiles) -> SafetensorsFile:
    """The weights of a directory that has none but packed ones, checked. `UserError` where they are damaged."""
    path = files.weights_path
    try:
        file = SafetensorsFile(path)
        if file.metadata.get("layout") != str(FORMAT_VERSION):
            raise ValueError("its layout is that of another version of this program")
        if file.metadata.get("sha256") != file.digest():
            raise ValueError("it does not match its checksum")
        check_sizes(file, files.config, "int8")
    except PARSE_ERRORS as error:
        raise UserError(f"{path} is damaged ({error}), and there is no other copy of these weights here") from None
    return file


def dequantize(files: ModelFiles) -> Mapping[str, Array]:
    """The same in fp32, by their names in `model.safetensors`."""
    file = load_int8_only(files)
    weights: dict[str, Array] = {}
    for name, shape in expected_shapes(files.config).items():
        if len(shape) == 1 or name == POSITION_EMBEDDING:
            weights[name] = file[name].reshape(shape)
        elif name == EMBEDDING and not files.config.tied:
            rows = file[f"{name}.rows"].reshape(shape).astype(np.float32)
            weights[name] = rows * file[f"{name}.scales"][:, None]
        else:
            weights[name] = np.ascontiguousarray(dequantize_int8(file[f"{name}.int8"], file[f"{name}.scales"], *shape))
    return weights


def load_fp32(files: ModelFiles) -> Mapping[str, Array]:
    """The model's own weights, checked: names, shapes, and that all are finite numbers."""
    if files.is_int8_only:
        return dequantize(files)
    file, expected = open_safetensors(files.weights_path), expected_shapes(files.config)
    for name in sorted(expected.keys() | file.keys()):
        if name not in file or name not in expected:
            raise UserError(f"{file.path}: weight {quoted(name)} is {'unknown' if name in file else 'missing'}")
        if file[name].shape != expected[name]:
            raise UserError(f"{file.path}: {name} is {file[name].shape}, not {expected[name]}")
        if file[name].dtype != np.float32:
            raise UserError(f"{file.path}: {name} is {file[name].dtype}, not fp32")
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(file[name].sum(dtype=np.float64))
        if not finite:
            raise UserError(f"{file.path}: {name} holds numbers that are not finite; use another checkpoint")
    return file


def quantized_path(files: ModelFiles, precision: Precision) -> Path:
    return files.folder / f"packed-{precision}.safetensors"


def load_or_quantize(files: ModelFiles, precision: Precision) -> Mapping[str, Array]:
    """Packed weights: from the file beside the model where it is whole and of these weights, else made now.

    The model's own weights are only read again when their file has changed, in size, date, or by config.json.
    """
    if files.is_int8_only and precision == "int8":
        return load_int8_only(files)
    if files.folder.resolve() == BUNDLED_MODEL.resolve():  # small, and not a place to write to
        files.check_weights()
        return dict(quantize(files, precision))
    path, status = quantized_path(files, precision), files.weights_path.stat()
    metadata = {"layout": str(FORMAT_VERSION), "precision": precision, "source_sha256": files.weights_sha256}
    source_stat = {"source_bytes": str(status.st_size), "source_mtime_ns": str(status.st_mtime_ns)}
    if path.exists():
        file: SafetensorsFile | None = None
        try:
            file = SafetensorsFile(path)
            if not metadata.items() <= file.metadata.items():
                reason = "was made from other weights"
            elif file.metadata.get("sha256") != file.digest():
                reason = "is damaged"
            else:
                check_sizes(file, files.config, precision)
                if (
                    not source_stat.items() <= file.metadata.items()
                ):  # copied, or weights that config.json does not know
                    files.check_weights()
                return file
        except PermissionError as error:
            reason = f"cannot be read ({error})"
        except PARSE_ERRORS as error:
            reason = f"is damaged ({error})"
        file = None  # or Windows would not let go of the file
        log.warning("%s %s: packing the weights again", path, reason)
    else:
        log.info("packing the weights to %s, once: %s", precision, path)
    files.check_weights()
    tensors = dict(quantize(files, precision))
    try:
        write_safetensors(path, tensors, metadata | source_stat)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start packs again", path, error)
        return tensors
    return SafetensorsFile(path)


def quantized_sizes(config: ModelConfig, precision: Precision) -> dict[str, tuple[type, int]]:
    """Type and number of elements of each tensor of a packed file: the machine code believes them."""
    sizes: dict[str, tuple[type, int]] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1 or name == POSITION_EMBEDDING:
            sizes[name] = np.float32, int(np.prod(shape))
            continue
        rows, columns = round_up(shape[0], BLOCK_ROWS), round_up(shape[1], 8 if precision == "int8" else GROUP_SIZE)
        if name == EMBEDDING and not config.tied:
            sizes[f"{name}.rows"], sizes[f"{name}.scales"] = (np.int8, shape[0] * shape[1]), (np.float32, shape[0])
        elif precision == "int8":
            sizes[f"{name}.int8"], sizes[f"{name}.scales"] = (np.uint8, rows * columns), (np.float32, rows)
        else:
            sizes[f"{name}.int4"] = np.uint8, rows * columns // 2
            sizes[f"{name}.scales"] = np.uint16, rows * columns // GROUP_SIZE
    return sizes


def check_sizes(tensors: Mapping[str, Array], config: ModelConfig, precision: Precision) -> None:
    """`ValueError` unless every tensor is there, as large as it must be, and no other is."""
    sizes = quantized_sizes(config, precision)
    for name in tensors:
        if name not in sizes and not name.endswith(PADDING):
            raise ValueError(f"it holds {name}, of which the model knows nothing")
    for name, (dtype, size) in sizes.items():
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].size != size:
            raise ValueError(f"{name} is not of the model's size")


def quantize(files: ModelFiles, precision: Precision) -> Iterator[tuple[str, Array]]:
    """Every matrix in few bits, everything else as it is."""
    source = load_fp32(files)
    for name, weight in source.items():
        if weight.ndim == 1 or name == POSITION_EMBEDDING:
            yield name, weight
        elif name == EMBEDDING and not files.config.tied:
            values, scales = round_to_int8(weight)
            yield from ((f"{name}.rows", values), (f"{name}.scales", scales))
        elif precision == "int4":
            blocks, bf16_scales = quantize_int4(weight)
            yield from ((f"{name}.int4", blocks), (f"{name}.scales", bf16_scales))
        else:
            blocks, scales = quantize_int8(weight)
            yield from ((f"{name}.int8", blocks), (f"{name}.scales", scales))


def write_safetensors(path: Path, tensors: Mapping[str, Array], extra_metadata: Mapping[str, str]) -> None:
    """A safetensors file whose tensors begin at multiples of 64 bytes; whole or not at all."""
    header: dict[str, Any] = {}
    offset = 0
    parts: list[bytes | memoryview] = []
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        padding = bytes(-len(data) % ALIGNMENT)
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        if padding:  # safetensors allows no holes
            header[f"{name}{PADDING}"] = {
                "dtype": "U8",
                "shape": [len(padding)],
                "data_offsets": [offset + len(data), offset + len(data) + len(padding)],
            }
        for part in (data, padding):
            parts.append(part)
        offset += len(data) + len(padding)
    metadata = {**extra_metadata, "sha256": compute_digest(header, extra_metadata, *parts)}
    header_bytes = json.dumps(header | {"__metadata__": metadata}).encode()
    header_bytes += b" " * (-(8 + len(header_bytes)) % ALIGNMENT)
    fd, temp_path = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp_path, 0o666 & ~umask)  # as any new file: others may read it
        with os.fdopen(fd, "wb") as file:
            for part in (len(header_bytes).to_bytes(8, "little"), header_bytes, *parts):
                file.write(part)
        os.replace(temp_path, path)
    except BaseException:
        os.unlink(temp_path)
        raise
