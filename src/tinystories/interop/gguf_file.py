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

from tinystories.errors import UserError, shown

T = TypeVar("T")
Array = npt.NDArray[Any]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10  # types of values
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", 12: "d"}
# More is nonsense: real files have fewer than 100 values, 1,000 tensors, and vocabularies of 300,000 tokens.
MOST_VALUES, MOST_TENSORS, MOST_STRINGS = 10_000, 100_000, 2_000_000
LONGEST_NAME = 65_535  # bytes
MOST_DIMENSIONS = 4
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}


def package() -> ModuleType:
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
class Stored:
    """A tensor as it lies in the file: rows first, each row a number of whole blocks of its kind."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: memoryview


class GgufFile:
    """Values by key: int, float, bool, str, lists of bytes (of texts), arrays (of numbers). Tensors by name."""

    def __init__(self, path: Path) -> None:
        """`UserError` where the file is not GGUF or is damaged. Tensors stay on the disk until `weight`."""
        self.path = path
        self.gguf = package()
        self.at = 0
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            with path.open("rb") as file:
                self.memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._parse()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{path} is no GGUF file, or damaged: {error}; copy it again") from None

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key; `UserError` where it is of another type, or missing and there is no default."""
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} does not say {key}; convert the model again")
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} is not {TYPE_NAMES[kind]}")
        return value

    def numbers(self, key: str) -> list[Any] | None:
        """The value of a key that holds a list of numbers; None where it is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise UserError(f"{self.path}: {key} is not a list of numbers")
        return None if value is None else value.tolist()

    def weight(self, name: str) -> Array:
        """A tensor in fp32; of a file in fp32 no copy."""
        stored = self.tensors[name]
        data = np.frombuffer(stored.data, np.uint8).reshape(*stored.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # damaged scales; Portable.check refuses what comes of them
                weight: Array = self.gguf.quants.dequantize(data, stored.kind)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {name} is of type {stored.kind.name}, which is not supported; use F32, F16, BF16, Q8_0"
                " or Q4_0"
            ) from None
        return weight

    def _parse(self) -> None:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number(U32)
        if version not in VERSIONS:
            raise ValueError(f"its version {version} is not 2 or 3 (little-endian)")
        n_tensors, n_values = self._number(U64), self._number(U64)
        if n_tensors > MOST_TENSORS or n_values > MOST_VALUES:
            raise ValueError(f"it claims {n_tensors:,} tensors and {n_values:,} values")
        for _ in range(n_values):
            key = self._name()
            if key in self.values:
                raise ValueError(f"it says {shown(key)} twice")
            self.values[key] = self._value(self._number(U32))
        infos = [self._info() for _ in range(n_tensors)]
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment={shown(alignment)} is not a multiple of 8")
        self._place(infos, self.at + -self.at % alignment, alignment)

    def _place(self, infos: list[tuple[str, Any, tuple[int, ...], int]], begin: int, alignment: int) -> None:
        last, end = "the header", begin
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            block, size = self.gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(f"rows of {shape[-1]:,} weights cannot be {kind.name} ({shown(name)})")
            if name in self.tensors:
                raise ValueError(f"tensor {shown(name)} is there twice")
            if begin + offset < end or offset % alignment:
                raise ValueError(
                    f"tensor {shown(name)} begins within {shown(last)}, or not at a multiple of {alignment}"
                )
            end = begin + offset + math.prod(shape) // block * size
            if end > len(self.memory):
                raise ValueError(f"tensor {shown(name)} ends {end - len(self.memory):,} bytes after the file")
            self.tensors[name] = Stored(kind, shape, self.memory[begin + offset : end])
            last = name

    def _info(self) -> tuple[str, Any, tuple[int, ...], int]:
        """Name, kind, shape and offset of a tensor."""
        name, n = self._name(), self._number(U32)
        if not 1 <= n <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {n:,} dimensions")
        shape = tuple(self._number(U64) for _ in range(n))[::-1]
        if 0 in shape:
            raise ValueError(f"tensor {shown(name)} is empty")
        return name, self.gguf.GGMLQuantizationType(self._number(U32)), shape, self._number(U64)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return str(self._text(), "utf-8")
        if kind != ARRAY:
            return self._number(kind)
        kind, count = self._number(U32), self._number(U64)
        if kind == STRING:
            if count > min(MOST_STRINGS, (len(self.memory) - self.at) // 8):
                raise ValueError(f"it claims a list of {count:,} texts")
            return [bytes(self._text()) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"it has a list of lists, or of type {kind:,}")
        dtype = np.dtype("<" + NUMBERS[kind]) if kind != BOOL else np.dtype(np.uint8)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _number(self, kind: int) -> Any:
        if kind not in NUMBERS:
            raise ValueError(f"it has a value of type {kind:,}")
        code = "<" + NUMBERS[kind]
        number = struct.unpack(code, self._take(struct.calcsize(code)))[0]
        return float(str(np.float32(number))) if kind == F32 else number  # 1e-05, not 9.999999747378752e-06

    def _name(self) -> str:
        return str(self._text(LONGEST_NAME), "utf-8")

    def _text(self, longest: int | None = None) -> memoryview:
        size = self._number(U64)
        if longest is not None and size > longest:
            raise ValueError(f"it has a name of {size:,} bytes")
        return self._take(size)

    def _take(self, size: int) -> memoryview:
        if size > len(self.memory) - self.at:
            raise ValueError("it ends within its header")
        self.at += size
        return self.memory[self.at - size : self.at]
