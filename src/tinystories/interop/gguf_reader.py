"""A GGUF file, read: its metadata and tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The reader of the `gguf` package believes every count; here each is compared with what is left of the file first.
"""

import dataclasses
import logging
import math
import mmap
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tinystories.errors import UserError, quoted

T = TypeVar("T")
Array = npt.NDArray[Any]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10  # types of values
STRUCT_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}
# More is nonsense: real files have fewer than 100 values, 1,000 tensors, and vocabularies of 300,000 tokens.
MAX_VALUES, MAX_TENSORS, MAX_STRINGS = 10_000, 100_000, 2_000_000
MAX_NAME_BYTES = 65_535  # bytes
MAX_DIMENSIONS = 4
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}


def import_gguf() -> ModuleType:
    """The `gguf` package; `UserError` where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            'GGUF files need the package gguf; install it with: pip install "tinystories-gpt[export]"'
        ) from None
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells every step
    return gguf


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as it lies in the file: rows first, each row a number of whole blocks of its kind."""

    tensor_type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: memoryview


class GgufFile:
    """Values by key: int, float, bool, str, lists of bytes (of texts), arrays (of numbers). Tensors by name."""

    def __init__(self, path: Path) -> None:
        """`UserError` where the file is not GGUF or is damaged. Tensors stay on the disk until `weight`."""
        self.path = path
        self.gguf = import_gguf()
        self.position = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                self.buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._parse()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{path} is no GGUF file, or damaged: {error}; copy it again") from None

    def get(self, key: str, value_type: type[T], default: T | None = None) -> T:
        """The value of a key; `UserError` where it is of another type, or missing and there is no default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} does not say {key}; convert the model again")
        if type(value) is not value_type:
            raise UserError(f"{self.path}: {key} is not {TYPE_NAMES[value_type]}")
        return value

    def get_numbers(self, key: str) -> list[Any] | None:
        """The value of a key that holds a list of numbers; None where it is missing."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise UserError(f"{self.path}: {key} is not a list of numbers")
        return None if value is None else value.tolist()

    def load_tensor(self, name: str) -> Array:
        """A tensor in fp32; of a file in fp32 no copy."""
        info = self.tensors[name]
        data = np.frombuffer(info.data, np.uint8).reshape(*info.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # damaged scales; Portable.check refuses what comes of them
                weight: Array = self.gguf.quants.dequantize(data, info.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {name} is of type {info.tensor_type.name}, which is not supported; use F32, F16, BF16, Q8_0"
                " or Q4_0"
            ) from None
        return weight

    def _parse(self) -> None:
        if self._read_bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._read_number(U32)
        if version not in VERSIONS:
            raise ValueError(f"its version {version} is not 2 or 3 (little-endian)")
        n_tensors, n_values = self._read_number(U64), self._read_number(U64)
        if n_tensors > MAX_TENSORS or n_values > MAX_VALUES:
            raise ValueError(f"it claims {n_tensors:,} tensors and {n_values:,} values")
        for _ in range(n_values):
            key = self._read_name()
            if key in self.metadata:
                raise ValueError(f"it says {quoted(key)} twice")
            self.metadata[key] = self._read_value(self._read_number(U32))
        infos = [self._read_tensor_info() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment={quoted(alignment)} is not a multiple of 8")
        self._add_tensors(infos, self.position + -self.position % alignment, alignment)

    def _add_tensors(self, infos: list[tuple[str, Any, tuple[int, ...], int]], data_start: int, alignment: int) -> None:
        previous_name, end = "the header", data_start
        for name, tensor_type, shape, offset in sorted(infos, key=lambda info: info[3]):
            block_size, type_size = self.gguf.GGML_QUANT_SIZES[tensor_type]
            if shape[-1] % block_size:
                raise ValueError(f"rows of {shape[-1]:,} weights cannot be {tensor_type.name} ({quoted(name)})")
            if name in self.tensors:
                raise ValueError(f"tensor {quoted(name)} is there twice")
            if data_start + offset < end or offset % alignment:
                raise ValueError(
                    f"tensor {quoted(name)} begins within {quoted(previous_name)}, or not at a multiple of {alignment}"
                )
            end = data_start + offset + math.prod(shape) // block_size * type_size
            if end > len(self.buffer):
                raise ValueError(f"tensor {quoted(name)} ends {end - len(self.buffer):,} bytes after the file")
            self.tensors[name] = TensorInfo(tensor_type, shape, self.buffer[data_start + offset : end])
            previous_name = name

    def _read_tensor_info(self) -> tuple[str, Any, tuple[int, ...], int]:
        """Name, kind, shape and offset of a tensor."""
        name, n_dims = self._read_name(), self._read_number(U32)
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {quoted(name)} has {n_dims:,} dimensions")
        shape = tuple(self._read_number(U64) for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise ValueError(f"tensor {quoted(name)} is empty")
        return name, self.gguf.GGMLQuantizationType(self._read_number(U32)), shape, self._read_number(U64)

    def _read_value(self, value_type: int) -> Any:
        if value_type == STRING:
            return str(self._read_string(), "utf-8")
        if value_type != ARRAY:
            return self._read_number(value_type)
        value_type, count = self._read_number(U32), self._read_number(U64)
        if value_type == STRING:
            if count > min(MAX_STRINGS, (len(self.buffer) - self.position) // 8):
                raise ValueError(f"it claims a list of {count:,} texts")
            return [bytes(self._read_string()) for _ in range(count)]
        if value_type not in STRUCT_CODES:
            raise ValueError(f"it has a list of lists, or of type {value_type:,}")
        dtype = np.dtype("<" + STRUCT_CODES[value_type]) if value_type != BOOL else np.dtype(np.uint8)
        return np.frombuffer(self._read_bytes(count * dtype.itemsize), dtype)

    def _read_number(self, value_type: int) -> Any:
        if value_type not in STRUCT_CODES:
            raise ValueError(f"it has a value of type {value_type:,}")
        struct_format = "<" + STRUCT_CODES[value_type]
        number = struct.unpack(struct_format, self._read_bytes(struct.calcsize(struct_format)))[0]
        return float(str(np.float32(number))) if value_type == F32 else number  # 1e-05, not 9.999999747378752e-06

    def _read_name(self) -> str:
        return str(self._read_string(MAX_NAME_BYTES), "utf-8")

    def _read_string(self, max_bytes: int | None = None) -> memoryview:
        size = self._read_number(U64)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"it has a name of {size:,} bytes")
        return self._read_bytes(size)

    def _read_bytes(self, size: int) -> memoryview:
        if size > len(self.buffer) - self.position:
            raise ValueError("it ends within its header")
        self.position += size
        return self.buffer[self.position - size : self.position]
