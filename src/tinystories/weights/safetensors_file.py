"""Safetensors files: map them into memory, and write them with a checksum of their contents."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.errors import quoted
from tinystories.files import atomic_file

Array = npt.NDArray[Any]

ALIGNMENT = 64  # bytes; a cache line
PADDING = ".filling"  # suffix of the names of padding tensors
# What a malformed or malicious header can raise.
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile(Mapping[str, Array]):
    """The tensors of a safetensors file by name, memory-mapped and read-only.

    The constructor raises one of `PARSE_ERRORS` if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError("it is not a regular file")
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
            raise ValueError(f"unsupported dtype {quoted(dtype)}")
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


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Tensors begin at multiples of 64 bytes; its SHA-256 is in the metadata.

    `safetensors.save_file` can do neither, and writes metadata in random order: no two of its files would be equal.
    """
    padded: dict[str, Array] = {}
    for name, array in tensors.items():
        padded[name] = np.ascontiguousarray(array)
        if array.nbytes % ALIGNMENT:  # the format does not allow gaps, so padding is stored as tensors
            padded[f"{name}{PADDING}"] = np.zeros(-array.nbytes % ALIGNMENT, np.uint8)
    header: dict[str, Any] = {}
    offset = 0
    for name, array in padded.items():
        end = offset + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    digest = compute_digest(header, metadata, *padded.values())
    header_bytes = json.dumps(header | {"__metadata__": {**metadata, "sha256": digest}}).encode()
    header_bytes += b" " * (-(8 + len(header_bytes)) % ALIGNMENT)
    with atomic_file(path, concurrent=True, sync=False) as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for array in padded.values():
            file.write(array.data)
