"""Memory-mapped weights: `model.safetensors` itself, or a cached file of quantized weights made from it.

The cached file, packed-int8.safetensors or packed-int4.safetensors, is a safetensors file too. Its metadata names the
weights it was made from and holds a SHA-256 of its contents.
"""

import hashlib
import json
import logging
import mmap
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
from tinystories.files import atomic_file

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Precision = Literal["fp32", "int8", "int4"]
FORMAT_VERSION = 2  # of quantized files; files of another version are made again
ALIGNMENT = 64  # bytes; a cache line
PADDING = ".filling"  # suffix of the names of padding tensors
# What a malformed or malicious header can raise.
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile(Mapping[str, Array]):
    """The tensors of a safetensors file by name, memory-mapped and read-only.

    The constructor raises one of `PARSE_ERRORS` if the file cannot be read; `open_safetensors` makes that a UserError.
    """

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
        """Return a tensor as a view of the mapped file; the arguments are its entry of the header."""
        if dtype not in DTYPES:
            raise ValueError(f"unsupported dtype {dtype}")
        np_dtype = np.dtype(DTYPES[dtype])
        begin, end = data_offsets
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if not 0 <= begin <= end <= len(self.buffer) - self.data_start or end - begin != count * np_dtype.itemsize:
            raise ValueError("a tensor ends after the end of the file, or its size does not match its shape")
        return np.frombuffer(self.buffer, np_dtype, count, self.data_start + begin).reshape(shape)

    def digest(self) -> str:
        """Return the SHA-256 of the contents, to compare with `metadata["sha256"]`."""
        return compute_digest(self.header, self.metadata, memoryview(self.buffer)[self.data_start :])

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def compute_digest(header: Mapping[str, Any], metadata: Mapping[str, str], *parts: Any) -> str:
    """Return the SHA-256 of everything in a quantized file except the digest itself; `parts` are its data in order."""
    hashed_metadata = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([header, hashed_metadata], sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def open_safetensors(path: Path) -> SafetensorsFile:
    """Map a safetensors file; raise UserError if it is not a valid one."""
    try:
        return SafetensorsFile(path)
    except PARSE_ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}") from None


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


def load_int8_only(files: ModelFiles) -> SafetensorsFile:
    """Load the quantized weights of a directory that has only int8 weights (see `int8_model`).

    Raises UserError if they are damaged, as they cannot be made again.
    """
    path = files.weights_path
    try:
        file = SafetensorsFile(path)
        if file.metadata.get("layout") != str(FORMAT_VERSION):
            raise ValueError("it was written by an incompatible version of tinystories")
        if file.metadata.get("sha256") != file.digest():
            raise ValueError("it does not match its checksum")
        check_sizes(file, files.config, "int8")
    except PARSE_ERRORS as error:
        raise UserError(
            f"{path} is damaged ({error}) and there is no other copy of these weights here; restore it from its source"
        ) from None
    return file


def dequantize(files: ModelFiles) -> Mapping[str, Array]:
    """Load the weights of a directory that has only int8 weights and dequantize them to fp32.

    Returns arrays by their names in `model.safetensors`, in the shapes of `expected_shapes`.
    """
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
    """Load the model's fp32 weights by name; raise UserError unless names, shapes and dtypes match and all are finite.

    The weights of an int8-only directory are dequantized.
    """
    if files.is_int8_only:
        return dequantize(files)
    file, expected = open_safetensors(files.weights_path), expected_shapes(files.config)
    for name in sorted(expected.keys() | file.keys()):
        if name not in file or name not in expected:
            raise UserError(f"{file.path}: weight {quoted(name)} is {'unknown' if name in file else 'missing'}")
        if file[name].shape != expected[name]:
            raise UserError(f"{file.path}: {name} has shape {file[name].shape}, not {expected[name]}")
        if file[name].dtype != np.float32:
            raise UserError(f"{file.path}: {name} has dtype {file[name].dtype}, not fp32")
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(file[name].sum(dtype=np.float64))
        if not finite:
            raise UserError(f"{file.path}: {name} has values that are not finite; use another checkpoint")
    return file


def quantized_path(files: ModelFiles, precision: Precision) -> Path:
    """Return where the quantized weights of a model are cached."""
    return files.folder / f"packed-{precision}.safetensors"


def load_or_quantize(files: ModelFiles, precision: Precision) -> Mapping[str, Array]:
    """Load quantized weights from the cached file next to the model, or quantize and cache them.

    The cached file is used if its checksum matches and it was made from the weights that config.json names. The model's
    own weights are hashed only if their size or modification time is not what the cached file recorded. If the folder
    is not writable, a warning is logged and the quantized weights stay in memory. Raises UserError if the model's own
    weights do not match their checksum or are not valid.
    """
    if files.is_int8_only and precision == "int8":
        return load_int8_only(files)
    if files.folder.resolve() == BUNDLED_MODEL.resolve():  # small, and site-packages is not ours to write to
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
                # The model was copied, or its weights were replaced without an update of config.json.
                if not source_stat.items() <= file.metadata.items():
                    files.check_weights()
                return file
        except PermissionError as error:
            reason = f"cannot be read ({error})"
        except PARSE_ERRORS as error:
            reason = f"is damaged ({error})"
        file = None  # close the mapping, else Windows does not allow the file to be replaced
        log.warning("%s %s: quantizing the weights again", path, reason)
    else:
        log.info("quantizing the weights to %s (once): %s", precision, path)
    files.check_weights()
    tensors = dict(quantize(files, precision))
    try:
        write_safetensors(path, tensors, metadata | source_stat)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start quantizes again", path, error)
        return tensors
    return SafetensorsFile(path)


def quantized_sizes(config: ModelConfig, precision: Precision) -> dict[str, tuple[type, int]]:
    """Return the dtype and number of elements of each tensor of a quantized file, without padding tensors.

    They must be checked before use, because the machine code cannot check them.
    """
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
    """Raise ValueError unless the tensors are exactly those of `quantized_sizes`; padding tensors are ignored."""
    sizes = quantized_sizes(config, precision)
    for name in tensors:
        if name not in sizes and not name.endswith(PADDING):
            raise ValueError(f"unknown tensor {quoted(name)}")
    for name, (dtype, size) in sizes.items():
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].size != size:
            raise ValueError(f"{name} is missing, or its size or dtype is wrong")


def quantize(files: ModelFiles, precision: Precision) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of the quantized file: matrices as int8 or int4 with scales, everything else in fp32.

    An embedding that is not tied to the LM head is int8 in plain row order (`.rows`), since only single rows are read.
    """
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
    """Write a safetensors file atomically. Tensors begin at multiples of 64 bytes; its SHA-256 is in the metadata."""
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
        if padding:  # the format does not allow gaps, so padding is stored as tensors
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
    with atomic_file(path, concurrent=True, sync=False) as file:
        for part in (len(header_bytes).to_bytes(8, "little"), header_bytes, *parts):
            file.write(part)
