"""Weights of fewer bits, laid out for the inner loops of `intrinsics`, which says how a block of 8 rows lies.

int8: one fp32 scale for each row. int4: one bf16 scale for each group of 32 columns; values -8..7, stored plus 8.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.cpu.fields import BLOCK, GROUP

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

SMALLEST = 1e-30  # a smaller scale stands for zeros: its inverse would overflow


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def aligned(shape: int | tuple[int, ...], kind: Any) -> Array:
    """A new array, not filled; it begins at a cache line of its own."""
    n_bytes = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = np.empty(n_bytes + 128, dtype=np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + n_bytes].view(kind).reshape(shape)


def rounded_to_int8(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Integers -127..127 and the scale of each row."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales < SMALLEST] = 0
    factors = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weight * factors[:, None]).astype(np.int8), scales


def pack_int8(weight: Floats) -> tuple[Bytes, Floats]:
    """A matrix (outer, inner): its blocks, and the scales of its rows, both padded with zeros to whole blocks."""
    outer, inner = weight.shape
    whole = np.zeros((padded(outer, BLOCK), padded(inner, 8)), dtype=np.int8)
    scales = np.zeros(len(whole), dtype=np.float32)
    whole[:outer, :inner], scales[:outer] = rounded_to_int8(weight)
    blocks = whole.reshape(-1, BLOCK, whole.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(-1), scales


def unpack_int8(packed: Bytes, scales: Floats, rows: int, inner: int) -> Floats:
    """The matrix (rows, inner) that `pack_int8` left."""
    blocks = packed.view(np.int8).reshape(-1, padded(inner, 8) // 2, BLOCK, 2).transpose(0, 2, 1, 3)
    values = blocks.reshape(-1, padded(inner, 8)).astype(np.float32) * scales[:, None]
    return values[:rows, :inner]


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """The nearest bf16 numbers, as their bits (ties away from zero)."""
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded_to_int4(groups: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Integers 0..15 (value + 8) and bf16 scales of groups (n, 32).

    What is largest in magnitude becomes -8, as in llama.cpp's Q4_0. Looking for better scales gains nothing
    (docs/log.md).
    """
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    bits = to_bf16(extreme / np.float32(-8))
    scales = from_bf16(bits)[:, None]
    factors = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > SMALLEST)
    return (np.clip(np.rint(groups * factors), -8, 7) + 8).astype(np.uint8), bits


def pack_int4(weight: Floats) -> tuple[Bytes, npt.NDArray[np.uint16]]:
    """A matrix (outer, inner): its blocks, and 8 scales for each group of a block."""
    outer, inner = weight.shape
    whole = np.zeros((padded(outer, BLOCK), padded(inner, GROUP)), dtype=np.float32)
    whole[:outer, :inner] = weight
    n_groups = whole.shape[1] // GROUP
    values, scales = rounded_to_int4(whole.reshape(-1, GROUP))
    # block, row, group, half, four columns, column of the four
    parts = values.reshape(-1, BLOCK, n_groups, 2, GROUP // 8, 4)
    both = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    blocks = both.transpose(0, 2, 3, 1, 4)
    scales = scales.reshape(-1, BLOCK, n_groups).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks).reshape(-1), np.ascontiguousarray(scales).reshape(-1)


def unpack_int4(packed: Bytes, scales: npt.NDArray[np.uint16], rows: int, inner: int) -> Floats:
    """The matrix (rows, inner) that `pack_int4` left."""
    n_groups = padded(inner, GROUP) // GROUP
    both = packed.reshape(-1, n_groups, GROUP // 8, BLOCK, 4)
    halves = np.stack([both & 15, both >> 4], axis=2).astype(np.float32) - 8  # block, group, half, four, row, column
    values = halves * from_bf16(scales).reshape(-1, n_groups, 1, 1, BLOCK, 1)
    return values.transpose(0, 4, 1, 2, 3, 5).reshape(-1, n_groups * GROUP)[:rows, :inner]


def rows_of(packed: Array, row_ids: npt.NDArray[np.int64], word: type, n_rows: int) -> Array:
    """Some rows of a packed matrix of n_rows, packed as well: of its blocks or of its scales.

    `word` is a type as wide as what stands together of one row: two columns of int8, four of int4, or one scale.
    """
    blocks: Array = packed.view(word).reshape(padded(n_rows, BLOCK) // BLOCK, -1, BLOCK)
    chosen = aligned((padded(len(row_ids), BLOCK) // BLOCK, blocks.shape[1], BLOCK), word)
    chosen[-1] = 0  # what no row fills
    to = np.arange(len(row_ids))
    chosen[to // BLOCK, :, to % BLOCK] = blocks[row_ids // BLOCK, :, row_ids % BLOCK]
    return chosen.reshape(-1).view(packed.dtype)
