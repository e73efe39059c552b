"""Matmul of rows of x with a weight matrix in fp32, int8 or int4, and the quantization of x that precedes it."""

from typing import Any, NamedTuple

import numpy as np

from tinystories.engine.cpu.kernels.elementwise import (
    MAX_FINITE_BITS,
    add_f32,
    copy_f32,
    max_magnitude_bits,
    quantize_i8,
    quantize_i16,
    sum_i8,
)
from tinystories.engine.cpu.kernels.layout import CALL, MATRIX, MODEL
from tinystories.engine.cpu.kernels.memory import njit, view_f32, view_i8, view_i16, view_i32
from tinystories.engine.cpu.kernels.simd import bitcast_f32, make_fp32_kernel
from tinystories.engine.cpu.kernels.simd_int4 import BLOCK_BYTES, SCALE_BYTES, make_int4_kernel
from tinystories.engine.cpu.kernels.simd_int8 import (
    STEP_BYTES,
    make_int8_kernel,
    make_int8_row_kernel,
    multiplies_bytes,
)
from tinystories.weights.quantize import BLOCK_ROWS, GROUP_SIZE, INT8_BLOCK_ROWS

# Rows of x whose largest magnitude is below this are quantized to zeros: the inverse scale would overflow.
MIN_AMAX = np.float32(1e-30)
# Rows of an fp32 matrix that stay in the second cache while groups of rows of x, which stay in the first, use them.
FP32_BLOCK_ROWS, FP32_GROUP_ROWS = 64, 8
# Inner loops of the matmuls. The suffix is (weight rows)x(rows of x) that one call multiplies.
int4_kernel_16x8, int4_kernel_16x4 = (make_int4_kernel(n_rows, 2) for n_rows in (8, 4))
int4_kernel_8x4, int4_kernel_8x1 = (make_int4_kernel(n_rows, 1) for n_rows in (4, 1))
int4_kernel_8x1_from_memory = make_int4_kernel(1, 1, from_memory=True)
fp32_kernel_1x1, fp32_kernel_4x1 = make_fp32_kernel(1, 1), make_fp32_kernel(4, 1)
fp32_kernel_4x2, fp32_kernel_4x4 = make_fp32_kernel(4, 2), make_fp32_kernel(4, 4)


class PrecisionKernels(NamedTuple):
    """What depends on the precision of the weights. An entry point is compiled with those of one precision."""

    quantize_row: Any  # (address of x, columns, row, ctx): write a row of x as the matmul reads it
    matmul: Any  # (m, base, lo, hi, first_row, n_rows, address of y, ctx), as `matmul_rows`
    block_rows: int  # rows of weights in a block


@njit
def quantize_rows(m, c, base, source, stride, ctx):
    """Quantize rows of x in the format that the matrix at `base` multiplies.

    They are `stride` floats apart, the first at the address `source`. INT8 weights take 16-bit activations (int8-a8:
    8-bit ones) with one scale per row, INT4 weights 8-bit ones with a scale per group; FP32 weights take x as it is,
    copied to `ctx.x` unless it is there.
    """
    for b in range(c[CALL.n_rows]):
        ctx.precision.quantize_row(source + 4 * stride * b, m[base + MATRIX.in_features], b, ctx)


@njit
def copy_row_f32(x, in_features, b, ctx):
    """Copy a row of floats at x to row b of `ctx.x`, unless it is there."""
    target = ctx.x + 4 * in_features * b
    if x != target:
        copy_f32((target,), (x,), in_features, ())


@njit
def choose_scales(x, n, quant_max):
    """Return the inverse scale and the scale with which n floats at x become integers of at most quant_max.

    The scale is NaN if an x is not finite, which propagates to the logits; then all integers are 0 times x.
    """
    bits = max_magnitude_bits(x, n, ())
    amax = bitcast_f32(bits)
    if bits > np.int32(MAX_FINITE_BITS):
        return np.float32(0), np.float32(np.nan)
    return quant_max / amax if amax > MIN_AMAX else np.float32(0), amax / quant_max


def make_row_quantizer(x_bits: int) -> Any:
    """Make the function that quantizes a row of floats at x, row b of the input, to 16 or 8 bits, for int8 weights.

    A row has one scale. The range of the integers is chosen so that a sum of in_features products with 8-bit weights
    cannot overflow 32 bits. Where `multiplies_bytes`, 8 bits are stored as bytes, in the first half of the memory of a
    row, and -128 times their sum at the start of the second half.
    """
    x_max = 2 ** (x_bits - 1) - 1

    @njit
    def quantize_row(x, in_features, b, ctx):
        width = (in_features + GROUP_SIZE - 1) // GROUP_SIZE * GROUP_SIZE
        quantized = ctx.quantized + 2 * width * b
        quant_max = np.float32(min(x_max, (2**31 - 1) // (127 * in_features)))
        inverse_scale, scale = choose_scales(x, in_features, quant_max)
        n_padding = width - in_features  # the kernels read whole groups
        if x_bits == 8 and multiplies_bytes():
            quantize_i8((quantized,), (x,), in_features, (inverse_scale,))
            byte_padding = view_i8(quantized + in_features, n_padding)
            for j in range(n_padding):
                byte_padding[j] = 0
            view_i32(quantized + width, 1)[0] = -128 * sum_i8(quantized, in_features, ())
        else:
            quantize_i16((quantized,), (x,), in_features, (inverse_scale,))
            padding = view_i16(quantized + 2 * in_features, n_padding)
            for j in range(n_padding):
                padding[j] = 0
        view_f32(ctx.scales, b + 1)[b] = scale

    return quantize_row


@njit
def quantize_row_i8(x, in_features, b, ctx):
    """Quantize a row of floats at x, row b of the input, to 8-bit integers, for int4 weights.

    Each group of GROUP_SIZE columns gets a scale, and -8 times the sum of its integers, with which the kernel corrects
    for the offset of 8 in the stored weights.
    """
    n_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    quantized = ctx.quantized + GROUP_SIZE * n_groups * b
    offsets = view_i32(ctx.group_offsets + 4 * n_groups * b, n_groups)
    scales = view_f32(ctx.group_scales + 4 * n_groups * b, n_groups)
    for g in range(n_groups):
        n = min(GROUP_SIZE, in_features - g * GROUP_SIZE)
        group, integers = x + 4 * GROUP_SIZE * g, quantized + GROUP_SIZE * g
        inverse_scale, scales[g] = choose_scales(group, n, np.float32(127))
        quantize_i8((integers,), (group,), n, (inverse_scale,))
        padding = view_i8(integers + n, GROUP_SIZE - n)
        for j in range(GROUP_SIZE - n):
            padding[j] = 0
        offsets[g] = -8 * sum_i8(integers, GROUP_SIZE, ())


@njit
def matmul_fp32(m, base, lo, hi, first_row, n_rows, y_address, ctx):
    """Multiply rows lo..hi-1 of an fp32 matrix, which has no padding, by rows first_row.. of x, as in `matmul_rows`.

    The main loop multiplies tiles of 4 weight rows by 4 rows of x, and fewer rows at the edges.
    """
    weights, in_features = m[base + MATRIX.weights], m[base + MATRIX.in_features]
    padded_out, hi = m[base + MATRIX.padded_out], min(hi, m[base + MATRIX.out_features])
    n_chunks, stride, y_stride = in_features // 8, 4 * in_features, 4 * padded_out
    # With one row of x, memory is read twice as fast in one sequence as in four; caches are not.
    max_weight_rows = 1 if m[MODEL.exceeds_caches] and n_rows - first_row == 1 else 4
    for block in range(lo, hi, FP32_BLOCK_ROWS):
        for group in range(first_row, n_rows, FP32_GROUP_ROWS):
            i, last_row = block, min(group + FP32_GROUP_ROWS, n_rows)
            while i < min(block + FP32_BLOCK_ROWS, hi):
                n_weight_rows = max_weight_rows if i + 4 <= hi else 1
                w_ptr, b, ahead = weights + stride * i, group, 4 * stride
                while b < last_row:
                    x_ptr, y_ptr = ctx.x + stride * b, y_address + y_stride * b + 4 * i
                    if n_weight_rows == 1:
                        fp32_kernel_1x1(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, y_stride, ahead)
                        b += 1
                    elif b + 4 <= last_row:
                        fp32_kernel_4x4(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, y_stride, ahead)
                        b += 4
                    elif b + 2 <= last_row:
                        fp32_kernel_4x2(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, y_stride, ahead)
                        b += 2
                    else:
                        fp32_kernel_4x1(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, y_stride, ahead)
                        b += 1
                    ahead = 0
                i += n_weight_rows
    if in_features % 8:  # the kernels only read whole vectors of 8 columns; add the remaining columns
        w, x = view_f32(weights, hi * in_features), view_f32(ctx.x, n_rows * in_features)
        y = view_f32(y_address, n_rows * padded_out)
        for i in range(lo, hi):
            for b in range(first_row, n_rows):
                for j in range(in_features // 8 * 8, in_features):
                    y[b * padded_out + i] += w[i * in_features + j] * x[b * in_features + j]


def make_matmul_int8(x_bits: int) -> Any:
    """Make the matmul of int8 weights and x of 16 or 8 bits."""
    row_kernel = make_int8_row_kernel(x_bits)
    kernel_32x8, kernel_32x4, kernel_32x2 = (make_int8_kernel(n_rows, 2, x_bits) for n_rows in (8, 4, 2))
    kernel_16x8, kernel_16x4, kernel_16x2 = (make_int8_kernel(n_rows, 1, x_bits) for n_rows in (8, 4, 2))

    @njit
    def matmul_int8(m, base, lo, hi, first_row, n_rows, y_address, ctx):
        """Multiply rows lo..hi-1 of an int8 matrix by rows first_row..n_rows-1 of the quantized x, as in `matmul_rows`.

        Two blocks of weights at a time, while they are in the cache, by eight rows of x at a time.
        """
        in_features, padded_out = m[base + MATRIX.in_features], m[base + MATRIX.padded_out]
        n_steps, n_groups = (in_features + 3) // 4, (in_features + GROUP_SIZE - 1) // GROUP_SIZE
        # Bytes of a block, and between rows of the quantized x (padded to whole groups) and of y.
        block, x_stride, y_stride = STEP_BYTES * n_steps, 2 * GROUP_SIZE * n_groups, 4 * padded_out
        spread = 0
        while 16 << spread <= n_rows - first_row:  # as many tiles of 8 rows
            spread += 1
        share = ((n_steps - 1 >> spread) + 1) * STEP_BYTES
        # A single row reads all blocks in one sequence.
        i, i_step = lo, 2 * INT8_BLOCK_ROWS if n_rows - first_row > 1 else hi - lo
        while i < hi:
            n_blocks = min(i_step, hi - i) // INT8_BLOCK_ROWS
            w, w_scales = m[base + MATRIX.weights] + block * (i // INT8_BLOCK_ROWS), m[base + MATRIX.scales] + 4 * i
            b, ahead = first_row, n_blocks * block  # prefetch the next blocks, each tile a share
            while b < n_rows:
                x, x_scales, y = ctx.quantized + x_stride * b, ctx.scales + 4 * b, y_address + y_stride * b + 4 * i
                left = n_rows - b
                if left == 1:
                    row_kernel(n_blocks, w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales)
                    b += 1
                elif n_blocks == 2:
                    if left >= 8:
                        kernel_32x8(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                        b += 8
                    elif left >= 4:
                        kernel_32x4(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                        b += 4
                    else:
                        kernel_32x2(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                        b += 2
                elif left >= 8:
                    kernel_16x8(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                    b += 8
                elif left >= 4:
                    kernel_16x4(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                    b += 4
                else:
                    kernel_16x2(w, block, n_steps, x, x_stride, y, y_stride, w_scales, x_scales, ahead, spread)
                    b += 2
                ahead += share
            i += n_blocks * INT8_BLOCK_ROWS

    return matmul_int8


@njit
def matmul_int4(m, base, lo, hi, first_row, n_rows, y_address, ctx):
    """Multiply rows lo..hi-1 of an int4 matrix by rows first_row..n_rows-1 of the quantized x, as in `matmul_rows`."""
    n_groups = (m[base + MATRIX.in_features] + GROUP_SIZE - 1) // GROUP_SIZE
    # Bytes between rows of the quantized x (padded to whole groups), of y, and of the scales and offsets of the groups.
    x_stride, y_stride, g_stride = GROUP_SIZE * n_groups, 4 * m[base + MATRIX.padded_out], 4 * n_groups
    i, many = lo, n_rows - first_row >= 4
    from_memory = m[MODEL.exceeds_caches] and n_rows - first_row == 1
    while i < hi:
        n_blocks, block = 2 if many and i + 2 * BLOCK_ROWS <= hi else 1, i // BLOCK_ROWS * n_groups
        w, w_scales = m[base + MATRIX.weights] + BLOCK_BYTES * block, m[base + MATRIX.scales] + SCALE_BYTES * block
        b = first_row
        while b < n_rows:
            x, y = ctx.quantized + x_stride * b, y_address + y_stride * b + 4 * i
            x_scales, x_offsets = ctx.group_scales + g_stride * b, ctx.group_offsets + g_stride * b
            if b + 4 > n_rows:
                for k in range(n_blocks):
                    w_k, scales_k = w + BLOCK_BYTES * n_groups * k, w_scales + SCALE_BYTES * n_groups * k
                    y_k = y + 4 * BLOCK_ROWS * k
                    if from_memory:
                        int4_kernel_8x1_from_memory(
                            w_k, n_groups, x, x_stride, y_k, y_stride, scales_k, x_scales, x_offsets, g_stride, 1
                        )
                    else:
                        int4_kernel_8x1(
                            w_k, n_groups, x, x_stride, y_k, y_stride, scales_k, x_scales, x_offsets, g_stride, 1
                        )
                b += 1
            elif n_blocks == 1:
                n = (n_rows - b) // 4
                int4_kernel_8x4(w, n_groups, x, x_stride, y, y_stride, w_scales, x_scales, x_offsets, g_stride, n)
                b += 4 * n
            elif b + 8 > n_rows:
                int4_kernel_16x4(w, n_groups, x, x_stride, y, y_stride, w_scales, x_scales, x_offsets, g_stride, 1)
                b += 4
            else:
                n = (n_rows - b) // 8
                int4_kernel_16x8(w, n_groups, x, x_stride, y, y_stride, w_scales, x_scales, x_offsets, g_stride, n)
                b += 8 * n
        i += n_blocks * BLOCK_ROWS


FP32_KERNELS = PrecisionKernels(copy_row_f32, matmul_fp32, BLOCK_ROWS)
INT8_KERNELS, INT8_A8_KERNELS = (
    PrecisionKernels(make_row_quantizer(x_bits), make_matmul_int8(x_bits), INT8_BLOCK_ROWS) for x_bits in (16, 8)
)
INT4_KERNELS = PrecisionKernels(quantize_row_i8, matmul_int4, BLOCK_ROWS)
KERNELS = {"fp32": FP32_KERNELS, "int8": INT8_KERNELS, "int8-a8": INT8_A8_KERNELS, "int4": INT4_KERNELS}


@njit
def matmul_rows(m, c, base, first_row, y_address, ctx):
    """Matmul of one piece of a matrix: y[b, lo:hi] = weights[lo:hi] . x[b] + bias[lo:hi] for b >= first_row.

    The matrix is described at m[base:]. x is (B, in_features) fp32 at `ctx.x`; for quantized weights, `quantize_rows`
    must have quantized it. y at `y_address` is (B, padded_out) fp32. Returns (lo, hi), which are multiples of the rows
    of a block, and hi may exceed out_features.
    """
    padded_out, n_rows, block_rows = m[base + MATRIX.padded_out], c[CALL.n_rows], ctx.precision.block_rows
    n_blocks = padded_out // block_rows
    lo = n_blocks * ctx.piece // ctx.n_pieces * block_rows
    hi = n_blocks * (ctx.piece + 1) // ctx.n_pieces * block_rows
    unpadded_hi = min(hi, m[base + MATRIX.out_features])
    ctx.precision.matmul(m, base, lo, hi, first_row, n_rows, y_address, ctx)
    if m[base + MATRIX.bias]:
        bias = m[base + MATRIX.bias] + 4 * lo
        for b in range(first_row, n_rows):
            y = y_address + 4 * (b * padded_out + lo)
            add_f32((y,), (y, bias), unpadded_hi - lo, ())
    return lo, hi


@njit
def opaque_zero(m):
    """Return 0 in a way that Numba cannot see: for a constant it would compile a second copy of `matmul_rows`."""
    return m[MODEL.n_layer] * 0


@njit
def matmul_add_residual(m, c, base, ctx):
    """Matmul of the rows in `ctx`, added to the residual stream: x (B, C) += y, for this piece's columns of x."""
    lo, hi = matmul_rows(m, c, base, opaque_zero(m), c[CALL.delta], ctx)
    C, padded_out = m[MODEL.n_embd], m[base + MATRIX.padded_out]
    for b in range(c[CALL.n_rows]):
        x, delta = c[CALL.x] + 4 * (b * C + lo), c[CALL.delta] + 4 * (b * padded_out + lo)
        add_f32((x,), (x, delta), min(hi, C) - lo, ())
