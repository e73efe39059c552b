"""Quantize matrices to int8 or int4, in the block layout that the kernels of the CPU engine multiply, and back.

int8: values -127..127 and one fp32 scale per row. int4: values -8..7, stored as 0..15, and one bf16 scale per group of
32 columns.

Block layout. Rows come in blocks, so that a vector holds sums of different rows and no sum is ever taken across a
vector.
  int8: blocks of 16 rows. For each pair of adjacent columns, the pairs of the 16 rows are adjacent (32 bytes); columns
  are padded to a multiple of 4, so that two pairs fill a cache line.
  int4: blocks of 8 rows. For each group of 32 columns, 4 x 32 bytes. Each 32 bytes hold 4 adjacent columns of 8 rows:
  in the low bits columns j..j+3 of the first 16 columns of the group, in the high bits the same columns of the second
  16.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Quantizer = Callable[[Floats], tuple[Array, Array]]  # a matrix to its values and scales
Dequantizer = Callable[[Array, Array, int, int], Floats]  # the reverse, from values, scales, out_features, in_features

# Rows of a quantized matrix that are interleaved in one block: of an int8 matrix, and of others.
INT8_BLOCK_ROWS, BLOCK_ROWS = 16, 8
# Columns of an int4 matrix that share a scale.
GROUP_SIZE = 32
# Values with a smaller scale are quantized to zeros: the inverse of the scale would overflow.
MIN_SCALE = 1e-30


def round_up(n: int, multiple: int) -> int:
    """Round n up to a multiple."""
    return -(-n // multiple) * multiple


def allocate_aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an uninitialized array that begins on a cache line (64 bytes) and shares none with other arrays."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(n_bytes + 128, dtype=np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n_bytes].view(dtype).reshape(shape)


def round_to_int8(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Quantize each row of a matrix symmetrically: return integers -127..127 and the scale of each row."""
    scales = np.abs(weight).max(axis=1) / np.float32(127)
    scales[scales < MIN_SCALE] = 0
    inverse_scales = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weight * inverse_scales[:, None]).astype(np.int8), scales


def quantize_int8(weight: Floats) -> tuple[Bytes, Floats]:
    """Quantize a matrix (out_features, in_features) to int8; return the packed blocks and a scale per row.

    Rows are padded with zeros to a multiple of 16, columns to a multiple of 4.
    """
    values, scales = round_to_int8(weight)
    return pack_int8(values), pad_rows(scales, INT8_BLOCK_ROWS)


def pad_rows(array: Array, multiple: int) -> Array:
    """Append zeros to the first axis, up to a multiple."""
    padded = np.zeros((round_up(len(array), multiple), *array.shape[1:]), dtype=array.dtype)
    padded[: len(array)] = array
    return padded


def pack_int8(values: npt.NDArray[np.int8]) -> Bytes:
    """Arrange integers (out_features, in_features) in blocks (row block, column pair, row, column); pad with zeros."""
    out_features, in_features = values.shape
    padded = np.zeros((round_up(out_features, INT8_BLOCK_ROWS), round_up(in_features, 4)), dtype=np.int8)
    padded[:out_features, :in_features] = values
    blocks = allocate_aligned((len(padded) // INT8_BLOCK_ROWS, padded.shape[1] // 2, INT8_BLOCK_ROWS, 2), np.int8)
    blocks[...] = padded.reshape(-1, INT8_BLOCK_ROWS, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return blocks.view(np.uint8).reshape(-1)


def unpack_int8(
    quantized: Bytes, out_features: int, in_features: int, block_rows: int = INT8_BLOCK_ROWS, column_multiple: int = 4
) -> npt.NDArray[np.int8]:
    """Return the integers (out_features, in_features) of the output of `pack_int8`, or of a layout of other blocks."""
    blocks = quantized.view(np.int8).reshape(-1, round_up(in_features, column_multiple) // 2, block_rows, 2)
    return blocks.transpose(0, 2, 1, 3).reshape(len(blocks) * block_rows, -1)[:out_features, :in_features]


def dequantize_rows(values: npt.NDArray[np.int8], scales: Floats, out_features: int, in_features: int) -> Floats:
    """Return the fp32 matrix (out_features, in_features) of the output of `round_to_int8`."""
    return values.reshape(out_features, in_features) * scales[:, None]


def dequantize_int8(quantized: Bytes, scales: Floats, out_features: int, in_features: int) -> Floats:
    """Return the fp32 matrix (out_features, in_features) of the output of `quantize_int8`."""
    return unpack_int8(quantized, out_features, in_features).astype(np.float32) * scales[:out_features, None]


def convert_int8_layout_2(
    quantized: Bytes, scales: Floats, out_features: int, in_features: int
) -> tuple[Bytes, Floats]:
    """Convert a matrix in layout 2 (blocks of 8 rows, columns padded to a multiple of 8) to the present one."""
    values = unpack_int8(quantized, out_features, in_features, block_rows=8, column_multiple=8)
    return pack_int8(values), pad_rows(scales[:out_features], INT8_BLOCK_ROWS)


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round fp32 to bf16, ties away from zero; return the bits."""
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    """Convert bits of bf16 numbers to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_int4(groups: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Quantize groups (n, 32) to 4 bits; return integers 0..15 (value + 8) and a bf16 scale per group.

    The value of largest magnitude becomes -8, as in llama.cpp's Q4_0, so a scale may be negative. Searching for better
    scales gains nothing (docs/log.md).
    """
    signed_amax = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    bits = to_bf16(signed_amax / np.float32(-8))
    scales = from_bf16(bits)[:, None]
    inverse_scales = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > MIN_SCALE)
    return (np.clip(np.rint(groups * inverse_scales), -8, 7) + 8).astype(np.uint8), bits


def quantize_int4(weight: Floats) -> tuple[Bytes, npt.NDArray[np.uint16]]:
    """Quantize a matrix (out_features, in_features) to int4; return the packed blocks and a scale per row and group.

    Rows are padded with zeros to a multiple of 8, columns to a multiple of 32. Scales are (row block, group, row).
    """
    out_features, in_features = weight.shape
    padded_weight = np.zeros((round_up(out_features, BLOCK_ROWS), round_up(in_features, GROUP_SIZE)), dtype=np.float32)
    padded_weight[:out_features, :in_features] = weight
    n_groups = padded_weight.shape[1] // GROUP_SIZE
    values, scales = round_to_int4(padded_weight.reshape(-1, GROUP_SIZE))
    # Axes: block, row, group, half of the group, quad of columns, column of the quad. A byte holds a column of the
    # first half in its low bits and the same column of the second half in its high bits.
    parts = values.reshape(-1, BLOCK_ROWS, n_groups, 2, GROUP_SIZE // 8, 4)
    nibbles = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
    blocks = nibbles.transpose(0, 2, 3, 1, 4)
    scales = scales.reshape(-1, BLOCK_ROWS, n_groups).transpose(0, 2, 1)
    return np.ascontiguousarray(blocks).reshape(-1), np.ascontiguousarray(scales).reshape(-1)


def dequantize_int4(quantized: Bytes, scales: npt.NDArray[np.uint16], out_features: int, in_features: int) -> Floats:
    """Return the fp32 matrix (out_features, in_features) of the output of `quantize_int4`."""
    n_groups = round_up(in_features, GROUP_SIZE) // GROUP_SIZE
    nibbles = quantized.reshape(-1, n_groups, GROUP_SIZE // 8, BLOCK_ROWS, 4)
    # Axes: block, group, half of the group, quad of columns, row, column of the quad.
    halves = np.stack([nibbles & 15, nibbles >> 4], axis=2).astype(np.float32) - 8
    values = halves * from_bf16(scales).reshape(-1, n_groups, 1, 1, BLOCK_ROWS, 1)
    return values.transpose(0, 4, 1, 2, 3, 5).reshape(-1, n_groups * GROUP_SIZE)[:out_features, :in_features]


# How a matrix can be stored: as int8 in plain row order ("rows"), or in blocks.
QUANTIZERS: dict[str, Quantizer] = {"rows": round_to_int8, "int8": quantize_int8, "int4": quantize_int4}
DEQUANTIZERS: dict[str, Dequantizer] = {"rows": dequantize_rows, "int8": dequantize_int8, "int4": dequantize_int4}
# Types as wide as the bytes of one row that are adjacent in a block: two int8 columns, or four bytes of int4 columns;
# and the type of a scale.
UNITS: dict[str, tuple[type, type]] = {"int8": (np.uint16, np.float32), "int4": (np.uint32, np.uint16)}


def quantized_sizes(encoding: str, out_features: int, in_features: int) -> tuple[tuple[type, int], tuple[type, int]]:
    """Return (dtype, number of elements) of the values and of the scales that `QUANTIZERS[encoding]` returns."""
    if encoding == "rows":
        return (np.int8, out_features * in_features), (np.float32, out_features)
    rows = round_up(out_features, block_rows(encoding))
    if encoding == "int8":
        return (np.uint8, rows * round_up(in_features, 4)), (np.float32, rows)
    columns = round_up(in_features, GROUP_SIZE)
    return (np.uint8, rows * columns // 2), (np.uint16, rows * columns // GROUP_SIZE)


def int8_sizes_layout_2(out_features: int, in_features: int) -> tuple[tuple[type, int], tuple[type, int]]:
    """Return what `quantized_sizes` returns, for a matrix in layout 2."""
    rows = round_up(out_features, 8)
    return (np.uint8, rows * round_up(in_features, 8)), (np.float32, rows)


def block_rows(precision: str) -> int:
    """Return how many rows of a matrix in this precision form a block; `padded_out` is a multiple of it."""
    return INT8_BLOCK_ROWS if precision == "int8" else BLOCK_ROWS


def gather_rows(
    encoding: str, values: Array, scales: Array, row_ids: npt.NDArray[np.int64], n_rows: int
) -> tuple[Array, Array]:
    """Gather rows of a matrix with n_rows rows, "int8" or "int4", into a new one; return its values and scales."""
    size = block_rows(encoding)
    # Block and row within the block, of each row in the source and in the destination.
    source, destination = np.divmod(row_ids, size), np.divmod(np.arange(len(row_ids)), size)
    gathered: list[Array] = []
    for packed, unit in zip((values, scales), UNITS[encoding], strict=True):
        blocks: Array = packed.view(unit).reshape(round_up(n_rows, size) // size, -1, size)
        n_blocks = round_up(len(row_ids), size) // size
        new_blocks = allocate_aligned((n_blocks, *blocks.shape[1:]), unit)
        new_blocks[-1] = 0  # rows that pad the last block
        new_blocks[destination[0], :, destination[1]] = blocks[source[0], :, source[1]]
        gathered.append(new_blocks.reshape(-1).view(packed.dtype))
    return gathered[0], gathered[1]
