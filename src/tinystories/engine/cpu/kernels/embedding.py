"""Token and position embeddings: rows of a table in fp32, or in the layouts of `weights.quantize`."""

import numpy as np

from tinystories.engine.cpu.kernels.elementwise import add_f32, copy_f32
from tinystories.engine.cpu.kernels.layout import CALL, FP32, INT8, INT8_ROWS, MATRIX, MODEL
from tinystories.engine.cpu.kernels.memory import njit, view_f32, view_i8, view_i64, view_u8, view_u16
from tinystories.engine.cpu.kernels.simd import bitcast_f32
from tinystories.weights.quantize import BLOCK_ROWS, GROUP_SIZE, INT8_BLOCK_ROWS


@njit
def embed_int8(weights, scales, row, C, x):
    """Dequantize one row of a matrix in blocks of int8."""
    block_bytes = INT8_BLOCK_ROWS * ((C + 3) // 4 * 4)
    block = view_i8(weights + row // INT8_BLOCK_ROWS * block_bytes, block_bytes)
    scale, first = view_f32(scales, row + 1)[row], row % INT8_BLOCK_ROWS * 2
    for j in range(C):  # pairs of columns of all rows of the block are adjacent
        x[j] = np.float32(block[j // 2 * 2 * INT8_BLOCK_ROWS + first + j % 2]) * scale


@njit
def embed_int4(weights, scales, row, C, x):
    """Dequantize one row of a matrix in blocks of int4."""
    n_groups = (C + GROUP_SIZE - 1) // GROUP_SIZE
    block_bytes = BLOCK_ROWS * n_groups * GROUP_SIZE // 2
    block = view_u8(weights + row // BLOCK_ROWS * block_bytes, block_bytes)
    block_scales = view_u16(scales + 2 * (row // BLOCK_ROWS * n_groups * BLOCK_ROWS), n_groups * BLOCK_ROWS)
    for j in range(C):  # a byte holds two columns that are half a group apart
        group, column = j // GROUP_SIZE, j % (GROUP_SIZE // 2)
        byte = block[(group * (GROUP_SIZE // 8) + column // 4) * 4 * BLOCK_ROWS + row % BLOCK_ROWS * 4 + column % 4]
        value = np.int32(byte >> 4) if j % GROUP_SIZE >= GROUP_SIZE // 2 else np.int32(byte & 15)
        scale = bitcast_f32(np.int32(block_scales[group * BLOCK_ROWS + row % BLOCK_ROWS]) << np.int32(16))
        x[j] = np.float32(value - 8) * scale


@njit
def embed(m, c, ctx):
    """Write the embeddings of the tokens, position embeddings included, to c[CALL.x].

    The rows are split among the pieces.
    """
    C, n_rows = m[MODEL.n_embd], c[CALL.n_rows]
    ids, positions = view_i64(c[CALL.ids], n_rows), view_i64(c[CALL.positions], n_rows)
    kind, weights = m[MODEL.embedding + MATRIX.kind], m[MODEL.embedding + MATRIX.weights]
    scales = m[MODEL.embedding + MATRIX.scales]
    for b in range(ctx.piece, n_rows, ctx.n_pieces):
        row, address = ids[b], c[CALL.x] + 4 * C * b
        x = view_f32(address, C)
        if kind == FP32:
            copy_f32((address,), (weights + 4 * C * row,), C, ())
        elif kind == INT8_ROWS:
            values, scale = view_i8(weights + C * row, C), view_f32(scales, row + 1)[row]
            for j in range(C):
                x[j] = np.float32(values[j]) * scale
        elif kind == INT8:
            embed_int8(weights, scales, row, C, x)
        else:
            embed_int4(weights, scales, row, C, x)
        if m[MODEL.position_embedding]:
            add_f32((address,), (address, m[MODEL.position_embedding] + 4 * C * positions[b]), C, ())
