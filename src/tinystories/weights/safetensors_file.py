"""Safetensors files: map them into memory, and write them with a checksum of their contents."""

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.errors import quoted
from tinystories.files import atomic_file

Array = npt.NDArray[Any]

ALIGNMENT = 64  # bytes; a cache line
# Smaller files are mapped: the processor's caches hold them, or most of them.
MIN_LARGE_PAGES_BYTES = 32_000_000
PADDING = ".filling"  # suffix of the names of padding tensors
# What a malformed or malicious header can raise.
PARSE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
DTYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "U16": np.uint16}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class SafetensorsFile(Mapping[str, Array]):
    """The tensors of a safetensors file by name, read-only: memory-mapped, or in large pages (`open_buffer`).

    The constructor raises one of `PARSE_ERRORS` if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            self.buffer = open_buffer(file)
        header_size = int.from_bytes(self.buffer[:8], "little")
        if not 2 <= header_size <= len(self.buffer) - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(bytes(self.buffer[8 : 8 + header_size]))
        self.data_start = 8 + header_size
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.header = header
        self.tensors = {name: self.view(**entry) for name, entry in header.items()}

    def view(self, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
        """Return a tensor as a view of the buffer; the arguments are its entry of the header."""
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
        return compute_digest(self.header, self.metadata, self.buffer[self.data_start :])

    def __getitem__(self, name: str) -> Array:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def open_buffer(file: io.BufferedReader) -> memoryview:
    """Map a file into memory; or read it into pages of 2 MB, if it is large and the system has such pages.

    The CPU engine reads all weights for each token. With the small pages that most systems have for files, the
    processor spends up to a third of the time on finding them.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if n_bytes < MIN_LARGE_PAGES_BYTES or not fits_large_pages(n_bytes):
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    buffer = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    if file.readinto(buffer) != n_bytes:
        raise ValueError("it became shorter while it was read")
    return memoryview(buffer).toreadonly()


def fits_large_pages(n_bytes: int, root: Path = Path("/")) -> bool:
    """Return whether Linux gives pages of 2 MB to programs that ask, and four times as much memory is available.

    Unlike a mapped file, such memory is the process's own: it is not shared, and the system cannot take it back. The
    limit of a container (cgroup v2) counts as available.
    """
    try:
        modes = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
        available = re.search(r"MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text())
        limit_file = root / "sys/fs/cgroup/memory.max"
        limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    except OSError:
        return False
    if "[never]" in modes or available is None:
        return False
    return 4 * n_bytes <= min(1024 * int(available[1]), int(limit) if limit.isdigit() else math.inf)


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
