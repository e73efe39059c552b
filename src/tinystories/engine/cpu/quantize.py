"""Weights of fewer bits, laid out for the inner loops of `intrinsics`, which says how a block of 8 rows lies.

int8: one fp32 scale for each row. int4: one bf16 scale for each group of 32 columns; values -8..7, stored plus 8.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.cpu.layout import BLOCK_ROWS, GROUP_SIZE

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

MIN_SCALE = 1e-30  # a smaller scale stands for zeros: its inverse would overflow


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def allocate_aligned(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """A new array, not filled; it begins at a cache line of its own."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(n_bytes + 128, dtype=np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n_bytes].view(dtype).reshape(shape)


def round_to_int8(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Integers -127..127 and the scale of each row."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales < MIN_SCALE] = 0
    inverse_scales = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weight * inverse_scales[:, None]).astype(np.int8), scales


def quantize_int8(weight: Floats) -> tuple[Bytes, Floats]:
    """A matrix (outer, inner): its blocks, and the scales of its rows, both padded with zeros to whole blocks."""
    out_features, in_features = weight.shape
    padded_values = np.zeros((round_up(out_features, BLOCK_ROWS), round_up(in_features, 8)), dtype=np.int8)
    scales = np.zeros(len(padded_values), dtype=np.float32)
    padded_values[:out_features, :in_features], scales[:out_features] = round_to_int8(weight)
    blocks = padded_values.reshape(-1, BLOCK_ROWS, padded_values.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(-1), scales


def dequantize_int8(quantized: Bytes, scales: Floats, out_features: int, in_features: int) -> Floats:
    """The matrix (rows, inner) that `pack_int8` left."""
    blocks = quantized.view(np.int8).reshape(-1, round_up(in_features, 8) // 2, BLOCK_ROWS, 2).transpose(0, 2, 1, 3)
    values = blocks.reshape(-1, round_up(in_features, 8)).astype(np.float32) * scales[:, None]
    return values[:out_features, :in_features]


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """The nearest bf16 numbers, as their bits (ties away from zero)."""
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_int4(groups: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Integers 0..15 (value + 8) and bf16 scales of groups (n, 32).

    What is largest in magnitude becomes -8, as in llama.cpp's Q4_0. Looking for better scales gains nothing
    (docs/log.md).
    """
    signed_amax = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    bits = to_bf16(signed_amax / np.float32(-8))
    scales = from_bf16(bits)[:, None]
    inverse_scales = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > MIN_SCALE)
    return (np.clip(np.rint(groups * inverse_scales), -8, 7) + 8).astype(np.uint8), bits


def quantize_int4(weight: Floats) -> tuple[Bytes, npt.NDArray[np.uint16]]:
    """A matrix (outer, inner): its blocks, and 8 scales for each group of a block."""
    out_features, in_features = weight.shape
    padded_weight = np.zeros((round_up(out_features, BLOCK_ROWS), round_up(in_features, GROUP_SIZE)), dtype=np.float32)
    padded_weight[:out_features, :in_features] = weight
    n_groups = padded_weight.shape[1] // GROUP_SIZE
    values, scales = round_to_int4(padded_weight.reshape(-1, GROUP_SIZE))
    # block, row, group, half, four columns, column of the four
    parts = values.reshape(-1, BLOCK_ROWS, n_groups, 2, GROUP_SIZE // 8, 4)
    nibbles = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    blocks = nibbles.transpose(0, 2, 3, 1, 4)
    scales = scales.reshape(-1, BLOCK_ROWS, n_groups).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks).reshape(-1), np.ascontiguousarray(scales).reshape(-1)


def dequantize_int4(quantized: Bytes, scales: npt.NDArray[np.uint16], out_features: int, in_features: int) -> Floats:
    """The matrix (rows, inner) that `pack_int4` left."""
    n_groups = round_up(in_features, GROUP_SIZE) // GROUP_SIZE
    nibbles = quantized.reshape(-1, n_groups, GROUP_SIZE // 8, BLOCK_ROWS, 4)
    halves = (
        np.stack([nibbles & 15, nibbles >> 4], axis=2).astype(np.float32) - 8
    )  # block, group, half, four, row, column
    values = halves * from_bf16(scales).reshape(-1, n_groups, 1, 1, BLOCK_ROWS, 1)
    return values.transpose(0, 4, 1, 2, 3, 5).reshape(-1, n_groups * GROUP_SIZE)[:out_features, :in_features]


def gather_rows(quantized: Array, row_ids: npt.NDArray[np.int64], unit_dtype: type, n_rows: int) -> Array:
    """Some rows of a packed matrix of n_rows, packed as well: of its blocks or of its scales.

    `word` is a type as wide as what stands together of one row: two columns of int8, four of int4, or one scale.
    """
    blocks: Array = quantized.view(unit_dtype).reshape(round_up(n_rows, BLOCK_ROWS) // BLOCK_ROWS, -1, BLOCK_ROWS)
    gathered = allocate_aligned(
        (round_up(len(row_ids), BLOCK_ROWS) // BLOCK_ROWS, blocks.shape[1], BLOCK_ROWS), unit_dtype
    )
    gathered[-1] = 0  # what no row fills
    destination_rows = np.arange(len(row_ids))
    gathered[destination_rows // BLOCK_ROWS, :, destination_rows % BLOCK_ROWS] = blocks[
        row_ids // BLOCK_ROWS, :, row_ids % BLOCK_ROWS
    ]
    return gathered.reshape(-1).view(quantized.dtype)
