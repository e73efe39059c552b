"""GGUF parser for untrusted files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The reader of the `gguf` package trusts every count in the file. This one first checks each against the bytes that are
left in the file.
"""

import dataclasses
import logging
import math
import mmap
import struct
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinystories.errors import UserError, quoted
from tinystories.formats.bundle import Array
from tinystories.formats.protocol import import_package

T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10  # type codes of metadata values
STRUCT_CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}
# Larger claims are rejected: real files have fewer than 100 values, 1,000 tensors, and 300,000 tokens.
MAX_VALUES, MAX_TENSORS, MAX_STRINGS = 10_000, 100_000, 2_000_000
MAX_NAME_BYTES = 65_535
MAX_DIMENSIONS = 4
TYPE_NAMES = {int: "an integer", float: "a float", str: "a string", bool: "a boolean", list: "a list of strings"}


def import_gguf() -> Any:
    """Import the `gguf` package, without its log of every step; `UserError` if it is not installed."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return import_package("gguf", "a GGUF file")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as stored in the file: row-major; each row is a whole number of blocks of `tensor_type`."""

    tensor_type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: memoryview


class GgufFile:
    """A parsed GGUF file; tensor data stays on disk (memory-mapped).

    `metadata`: values by key; strings are str, lists of strings are lists of bytes, lists of numbers are NumPy arrays.
    `tensors`: `TensorInfo` by name.
    """

    def __init__(self, path: Path) -> None:
        """Map and parse the file; `UserError` if it is not a GGUF file or is damaged."""
        self.path = path
        self.gguf = import_gguf()
        self.position = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with path.open("rb") as file:
                self.buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._parse()
        except ValueError as error:
            raise UserError(f"{path} is not a GGUF file, or is damaged: {error}; copy it again") from None

    def error(self, problem: str) -> UserError:
        """Return the error for contents that no converter writes."""
        return UserError(f"{self.path}: {problem}; convert the model again")

    def get(self, key: str, value_type: type[T], default: T | None = None) -> T:
        """Return the value of a key; `UserError` if it has another type, or is missing without a default."""
        value = self.metadata.get(key, default)
        if value is None or type(value) is not value_type:
            raise self.error(f"{key} is " + ("missing" if value is None else f"not {TYPE_NAMES[value_type]}"))
        return value

    def get_numbers(self, key: str) -> list[Any] | None:
        """Return a list of numbers; None if the key is missing, `UserError` if it has another type."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self.error(f"{key} is not a list of numbers")
        return None if value is None else value.tolist()

    def get_texts(self, key: str, default: list[bytes] | None = None) -> list[str]:
        """Return a list of strings; `UserError` if one is not UTF-8."""
        try:
            return [text.decode() for text in self.get(key, list, default)]
        except UnicodeDecodeError:
            raise self.error(f"{key} has a string that is not UTF-8") from None

    def load_tensor(self, name: str) -> Array:
        """Return a tensor dequantized to fp32; F32 tensors are not copied."""
        info = self.tensors[name]
        data = np.frombuffer(info.data, np.uint8).reshape(*info.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # damaged scales; ModelBundle.check rejects the result
                weight: Array = self.gguf.quants.dequantize(data, info.tensor_type)
        except NotImplementedError:
            supported = "is not supported; use F32, F16, BF16, Q8_0 or Q4_0"
            raise UserError(f"{self.path}: {name} is of type {info.tensor_type.name}, which {supported}") from None
        return weight

    def add_part(self, part: "GgufFile") -> None:
        """Add the tensors of another part of the same split model; `UserError` if both have one of the same name."""
        if duplicates := self.tensors.keys() & part.tensors.keys():
            raise UserError(f"{part.path}: {quoted(min(duplicates))} is also in {self.path}; download the model again")
        self.tensors |= part.tensors

    def _parse(self) -> None:
        if self._read_bytes(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        version = self._read_number(U32)
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not 2 or 3 (little-endian)")
        n_tensors, n_values = self._read_number(U64), self._read_number(U64)
        if n_tensors > MAX_TENSORS or n_values > MAX_VALUES:
            raise ValueError(f"implausible counts: {n_tensors:,} tensors and {n_values:,} values")
        for _ in range(n_values):
            key = self._read_name()
            if key in self.metadata:
                raise ValueError(f"duplicate key {quoted(key)}")
            self.metadata[key] = self._read_value(self._read_number(U32))
        infos = [self._read_tensor_info() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment={quoted(alignment)} is not a multiple of 8")
        self._add_tensors(infos, self.position + -self.position % alignment, alignment)

    def _add_tensors(self, infos: list[tuple[str, Any, tuple[int, ...], int]], data_start: int, alignment: int) -> None:
        """Check that the tensors are aligned, within the file and disjoint, in order of offset; add them."""
        previous_name, end = "the header", data_start
        for name, tensor_type, shape, offset in sorted(infos, key=lambda info: info[3]):
            block_size, type_size = self.gguf.GGML_QUANT_SIZES[tensor_type]
            if shape[-1] % block_size:
                raise ValueError(
                    f"rows of {shape[-1]:,} weights are not whole {tensor_type.name} blocks ({quoted(name)})"
                )
            if name in self.tensors:
                raise ValueError(f"duplicate tensor {quoted(name)}")
            if data_start + offset < end or offset % alignment:
                raise ValueError(
                    f"tensor {quoted(name)} overlaps {quoted(previous_name)}, or its offset is not a multiple of"
                    f" {alignment}"
                )
            end = data_start + offset + math.prod(shape) // block_size * type_size
            if end > len(self.buffer):
                raise ValueError(
                    f"tensor {quoted(name)} extends {end - len(self.buffer):,} bytes past the end of the file"
                )
            self.tensors[name] = TensorInfo(tensor_type, shape, self.buffer[data_start + offset : end])
            previous_name = name

    def _read_tensor_info(self) -> tuple[str, Any, tuple[int, ...], int]:
        """Read name, type, shape and offset of a tensor."""
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
                raise ValueError(f"implausible list of {count:,} strings")
            return [bytes(self._read_string()) for _ in range(count)]
        if value_type not in STRUCT_CODES:
            raise ValueError(f"a list has elements of type {value_type:,}, which is not supported")
        dtype = np.dtype("<" + STRUCT_CODES[value_type]) if value_type != BOOL else np.dtype(np.uint8)
        return np.frombuffer(self._read_bytes(count * dtype.itemsize), dtype)

    def _read_number(self, value_type: int) -> Any:
        if value_type not in STRUCT_CODES:
            raise ValueError(f"a value has type {value_type:,}, which does not exist")
        struct_format = "<" + STRUCT_CODES[value_type]
        number = struct.unpack(struct_format, self._read_bytes(struct.calcsize(struct_format)))[0]
        # An fp32 value becomes the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(number))) if value_type == F32 else number

    def _read_name(self) -> str:
        return str(self._read_string(MAX_NAME_BYTES), "utf-8")

    def _read_string(self, max_bytes: int | None = None) -> memoryview:
        size = self._read_number(U64)
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"a name has {size:,} bytes")
        return self._read_bytes(size)

    def _read_bytes(self, size: int) -> memoryview:
        if size > len(self.buffer) - self.position:
            raise ValueError("it ends inside its header")
        self.position += size
        return self.buffer[self.position - size : self.position]
