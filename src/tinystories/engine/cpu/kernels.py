"""The forward pass of the CPU engine: matmul, RMSNorm, RoPE, KV cache, attention and feed-forward, compiled by Numba.

`forward` runs B rows (new tokens) through the whole model. Every thread of the pool makes one call to it.

Decoding is memory-bound: each weight is read once per token, so threads must rarely wait. Each thread computes its own
output rows of every matrix, and all threads meet at a barrier only where one needs the results of the others. Cheap
work (norms, quantizing activations) is repeated by every thread instead of shared. Each sum is computed by one thread
in a fixed order, so results depend neither on the number of threads nor on the other rows of the batch.

Only `jit.compile_object` imports this module. Its inputs are two tables of 64-bit integers, some of them addresses: `m`
describes the model, `c` describes this call. `layout` names their fields, `runtime` fills them.

Notation: B = rows (new tokens of any slots), C = n_embd, D = head_dim, S = n_ctx. Matrices are (out_features,
in_features), and out_features is padded to a multiple of BLOCK_ROWS (`padded_out`), which is also the row stride of the
outputs. `base` is the index in `m` where the fields of a matrix begin, `layer_base` that of a layer. Work is split by
`thread` of `n_threads`; `lo` and `hi` bound the part of one thread.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray, types

from tinystories.engine.cpu.layout import (
    BLOCK_ROWS,
    CALL,
    FP32,
    GELU_ERF,
    GELU_TANH,
    GROUP_SIZE,
    INT8,
    LAYER,
    MATRIX,
    MODEL,
)
from tinystories.engine.cpu.simd import (
    barrier_wait,
    bitcast_f32,
    make_fp32_kernel,
    make_int4_kernel,
    make_int8_kernel,
    make_pointer_cast,
)

# Rows of x whose largest magnitude is below this are quantized to zeros: the inverse scale would overflow.
MIN_AMAX = np.float32(1e-30)
# Lets LLVM vectorize sums. "nnan" and "ninf" are left out on purpose: NaN and infinities must propagate.
FASTMATH = {"reassoc", "nsz", "contract"}
njit = numba.njit(fastmath=FASTMATH, error_model="numpy")

to_f32_pointer, to_i64_pointer = make_pointer_cast(types.float32), make_pointer_cast(types.int64)
to_i8_pointer, to_i16_pointer, to_i32_pointer = (
    make_pointer_cast(types.int8),
    make_pointer_cast(types.int16),
    make_pointer_cast(types.int32),
)
# Inner loops of the matmuls. The suffix is (weight rows)x(rows of x) that one call multiplies.
int8_kernel_8x1, int8_kernel_8x4 = make_int8_kernel(1), make_int8_kernel(4)
int4_kernel_8x1, int4_kernel_8x4 = make_int4_kernel(1), make_int4_kernel(4)
fp32_kernel_1x1, fp32_kernel_4x1, fp32_kernel_4x2 = (
    make_fp32_kernel(1, 1),
    make_fp32_kernel(4, 1),
    make_fp32_kernel(4, 2),
)


class ThreadScratch(NamedTuple):
    """Addresses of one thread's private memory: the input x of the next matmul, in fp32 and quantized.

    Memory map, for R = c[CALL.max_rows] rows of W = c[CALL.scratch_width] floats and groups of G = GROUP_SIZE columns:

        offset                type           elements   field
        0                     fp32           R W        x
        4 R W                 int16 or int8  R W        quantized: int16 for int8 weights, int8 for int4 weights
        6 R W                 fp32           R          scales: one per row (int8 weights)
        6 R W + 4 R           int32          R W / G    group_sums: sum of the quantized values (int4 weights)
        6 R W + 4 R + 4 R W/G fp32           R W / G    group_scales: one per group (int4 weights)

    `forward` computes these addresses. `Workspace` in runtime.py allocates the memory, R (4 W + 2 W + 4 + 2 * 4 W / G)
    bytes per thread: change both together. Rows are stored back to back at the width of the current matrix, not at W.
    `attention` uses `x` for its S attention weights, so R W >= S.
    """

    x: int
    quantized: int
    scales: int
    group_sums: int
    group_scales: int


@njit
def view_f32(address, n):
    """View n fp32 numbers at an address as an array, without a copy."""
    return carray(to_f32_pointer(address), (n,))


@njit
def exp(x):
    """Return e^x with a relative error below 2e-7; x is clamped to [-87.3, 88].

    The polynomial of Cephes' expf. It has no branches, so LLVM can vectorize it.
    """
    x = min(max(x, np.float32(-87.3)), np.float32(88))
    # e^x = 2^n e^r with n = round(x / ln 2). ln 2 is subtracted in two parts, so that r keeps its low bits.
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    # Build 2^n from its bits: a biased exponent and an empty mantissa.
    return y * bitcast_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@njit
def gelu_tanh(x):
    """Tanh approximation of GELU (Hendrycks and Gimpel 2016), as in GPT-2.

    x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    return x / (np.float32(1) + exp(x * (np.float32(-1.5957691216) + np.float32(-0.0713548163) * x * x)))


@njit
def gelu_erf(x):
    """Exact GELU, x (1 + erf(x / sqrt(2))) / 2, with an error below 1e-7 |x|.

    Abramowitz and Stegun, formula 7.1.26.
    """
    t = np.float32(1) / (np.float32(1) + np.float32(0.23164189) * abs(x))
    y = np.float32(1.061405429)
    y = y * t + np.float32(-1.453152027)
    y = y * t + np.float32(1.421413741)
    y = y * t + np.float32(-0.284496736)
    y = y * t + np.float32(0.254829592)
    tail = np.float32(0.5) * y * t * exp(np.float32(-0.5) * x * x)
    return x * (np.float32(1) - tail if x > np.float32(0) else tail)


@njit
def layer_or_rms_norm(x, weight, bias, modern, eps, y):
    """Write the RMSNorm (`modern`, which ignores `bias`) or LayerNorm (otherwise) of row x into y, which may be x."""
    n = np.float32(len(x))
    mean = np.float32(0)
    if not modern:
        for j in range(len(x)):
            mean += x[j]
        mean /= n
    total = np.float32(0)
    for j in range(len(x)):
        total += (x[j] - mean) * (x[j] - mean)
    scale = np.float32(1 / math.sqrt(total / n + eps))
    if modern:
        for j in range(len(x)):
            y[j] = x[j] * scale * weight[j]
    else:
        for j in range(len(x)):
            y[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@njit
def quantize_rows(kind, x, n_rows, in_features, scratch):
    """Quantize each row of x (B, in_features) into `scratch`, in the format that weights of this kind multiply.

    INT8 weights take 16-bit activations with one scale per row, INT4 weights 8-bit ones with a scale per group.
    """
    for b in range(n_rows):
        if kind == INT8:
            quantize_row_i16(x[b * in_features : (b + 1) * in_features], b, scratch)
        else:
            quantize_row_i8(x[b * in_features : (b + 1) * in_features], b, scratch)


@njit
def quantize_row_i16(x, b, scratch):
    """Quantize row b of x to 16-bit integers with one scale, for int8 weights.

    The range of the integers is chosen so that a sum of in_features products with 8-bit weights cannot overflow 32
    bits. A row that is not finite gets the scale NaN, which propagates to the logits.
    """
    in_features = len(x)
    quant_max = np.float32(min(32767, (2**31 - 1) // (127 * in_features)))
    width = (in_features + GROUP_SIZE - 1) // GROUP_SIZE * GROUP_SIZE
    quantized = carray(to_i16_pointer(scratch.quantized + 2 * width * b), (width,))
    amax, nan_if_bad = np.float32(0), np.float32(0)
    for j in range(in_features):
        amax = max(amax, abs(x[j]))
        nan_if_bad += x[j] * np.float32(0)  # becomes NaN if any x is NaN or infinite, else stays 0
    inverse_scale = quant_max / amax if amax > MIN_AMAX and nan_if_bad == 0 else np.float32(0)
    for j in range(in_features):
        quantized[j] = np.int16(np.rint(x[j] * inverse_scale)) if inverse_scale > 0 else np.int16(0)
    for j in range(in_features, width):  # the kernels read whole groups
        quantized[j] = 0
    view_f32(scratch.scales, b + 1)[b] = amax / quant_max + nan_if_bad


@njit
def quantize_row_i8(x, b, scratch):
    """Quantize row b of x to 8-bit integers, for int4 weights.

    Each group of GROUP_SIZE columns gets a scale and the sum of its integers; the kernel uses the sum to correct for
    the offset of 8 in the stored weights. A group that is not finite gets the scale NaN, as in `quantize_row_i16`.
    """
    in_features = len(x)
    n_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    quantized = carray(to_i8_pointer(scratch.quantized + GROUP_SIZE * n_groups * b), (n_groups * GROUP_SIZE,))
    group_sums = carray(to_i32_pointer(scratch.group_sums + 4 * n_groups * b), (n_groups,))
    scales = view_f32(scratch.group_scales + 4 * n_groups * b, n_groups)
    for g in range(n_groups):
        lo, hi = g * GROUP_SIZE, min((g + 1) * GROUP_SIZE, in_features)
        amax, nan_if_bad = np.float32(0), np.float32(0)
        for j in range(lo, hi):
            amax = max(amax, abs(x[j]))
            nan_if_bad += x[j] * np.float32(0)
        inverse_scale = np.float32(127) / amax if amax > MIN_AMAX and nan_if_bad == 0 else np.float32(0)
        total = np.int32(0)
        for j in range(lo, hi):
            value = np.int32(np.rint(x[j] * inverse_scale)) if inverse_scale > 0 else np.int32(0)
            quantized[j] = value
            total += value
        for j in range(hi, lo + GROUP_SIZE):
            quantized[j] = 0
        group_sums[g] = total
        scales[g] = amax / np.float32(127) + nan_if_bad


@njit
def matmul_rows_fp32(weights, in_features, lo, hi, x, n_rows, first_row, y, y_address, padded_out):
    """Matmul with fp32 weights: y[b, i] = weights[i] . x[b] for lo <= i < hi and first_row <= b < n_rows.

    `weights` is the address of an unpadded (out_features, in_features) matrix, `y_address` that of y. The main loop
    multiplies tiles of 4 weight rows by 2 rows of x, and single rows at the edges.
    """
    x_address, n_chunks, stride = x.ctypes.data, in_features // 8, 4 * in_features
    i = lo
    while i < hi:
        n_weight_rows = 4 if i + 4 <= hi else 1
        w_ptr = weights + stride * i
        b = first_row
        while b < n_rows:
            two_rows = n_weight_rows == 4 and b + 2 <= n_rows
            x_ptr, y_ptr = x_address + stride * b, y_address + 4 * (b * padded_out + i)
            if two_rows:
                fp32_kernel_4x2(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, 4 * padded_out)
            elif n_weight_rows == 4:
                fp32_kernel_4x1(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, 4 * padded_out)
            else:
                fp32_kernel_1x1(w_ptr, stride, x_ptr, stride, n_chunks, y_ptr, 4 * padded_out)
            b += 2 if two_rows else 1
        i += n_weight_rows
    if in_features % 8:  # the kernels only read whole vectors of 8 columns; add the remaining columns
        w = view_f32(weights, hi * in_features)
        for i in range(lo, hi):
            for b in range(first_row, n_rows):
                for j in range(in_features // 8 * 8, in_features):
                    y[b * padded_out + i] += w[i * in_features + j] * x[b * in_features + j]


@njit
def matmul_rows(m, base, x, n_rows, first_row, scratch, y_address, thread, n_threads):
    """Matmul of this thread's share of a matrix: y[b, lo:hi] = weights[lo:hi] . x[b] + bias[lo:hi] for b >= first_row.

    The matrix is described at m[base:]. x is (n_rows, in_features) fp32; for quantized weights `scratch` must hold x as
    quantized by `quantize_rows`. y at `y_address` is (n_rows, padded_out) fp32. Returns (lo, hi), which are multiples
    of BLOCK_ROWS, and hi may exceed out_features.
    """
    kind, padded_out, in_features, out_features = (
        m[base + MATRIX.kind],
        m[base + MATRIX.padded_out],
        m[base + MATRIX.in_features],
        m[base + MATRIX.out_features],
    )
    n_blocks = padded_out // BLOCK_ROWS
    lo, hi = n_blocks * thread // n_threads * BLOCK_ROWS, n_blocks * (thread + 1) // n_threads * BLOCK_ROWS
    weights, scales = m[base + MATRIX.weights], m[base + MATRIX.scales]
    n_groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    # Bytes between rows of the quantized x (padded to whole groups) and of y.
    x_stride, y_stride = (2 if kind == INT8 else 1) * GROUP_SIZE * n_groups, 4 * padded_out
    y = view_f32(y_address, n_rows * padded_out)
    if kind == FP32:
        matmul_rows_fp32(
            weights, in_features, lo, min(hi, out_features), x, n_rows, first_row, y, y_address, padded_out
        )
    else:
        for i in range(lo, hi, BLOCK_ROWS):  # each block of weights is loaded once for four rows of x
            b = first_row
            while b < n_rows:
                four_rows = b + 4 <= n_rows
                x_ptr, y_ptr = scratch.quantized + b * x_stride, y_address + b * y_stride + 4 * i
                x_scales_ptr = scratch.scales + 4 * b
                if kind == INT8:
                    n_chunks = (in_features + 7) // 8
                    w_ptr, w_scales_ptr = weights + 8 * n_chunks * i, scales + 4 * i
                    if four_rows:
                        int8_kernel_8x4(w_ptr, x_ptr, x_stride, n_chunks, y_ptr, y_stride, w_scales_ptr, x_scales_ptr)
                    else:
                        int8_kernel_8x1(w_ptr, x_ptr, x_stride, n_chunks, y_ptr, y_stride, w_scales_ptr, x_scales_ptr)
                else:
                    w_ptr, w_scales_ptr = weights + GROUP_SIZE // 2 * n_groups * i, scales + 2 * n_groups * i
                    x_scales_ptr, x_sums_ptr = (
                        scratch.group_scales + 4 * n_groups * b,
                        scratch.group_sums + 4 * n_groups * b,
                    )
                    if four_rows:
                        int4_kernel_8x4(
                            w_ptr,
                            x_ptr,
                            x_stride,
                            n_groups,
                            y_ptr,
                            y_stride,
                            w_scales_ptr,
                            x_scales_ptr,
                            x_sums_ptr,
                            4 * n_groups,
                        )
                    else:
                        int4_kernel_8x1(
                            w_ptr,
                            x_ptr,
                            x_stride,
                            n_groups,
                            y_ptr,
                            y_stride,
                            w_scales_ptr,
                            x_scales_ptr,
                            x_sums_ptr,
                            4 * n_groups,
                        )
                b += 4 if four_rows else 1
    if m[base + MATRIX.bias]:
        bias = view_f32(m[base + MATRIX.bias], out_features)
        for b in range(first_row, n_rows):
            for i in range(lo, min(hi, out_features)):
                y[b * padded_out + i] += bias[i]
    return lo, hi


@njit
def opaque_zero(m):
    """Return 0 in a way that Numba cannot see: for a constant it would compile a second copy of `matmul_rows`."""
    return m[MODEL.n_layer] * 0


@njit
def matmul_add_residual(m, base, x, n_rows, scratch, c, thread, n_threads):
    """Matmul of the rows in `scratch`, added to the residual stream: x (B, C) += y, for this thread's columns of x."""
    C, padded_out = m[MODEL.n_embd], m[base + MATRIX.padded_out]
    lo, hi = matmul_rows(
        m,
        base,
        view_f32(scratch.x, n_rows * m[base + MATRIX.in_features]),
        n_rows,
        opaque_zero(m),
        scratch,
        c[CALL.delta],
        thread,
        n_threads,
    )
    delta = view_f32(c[CALL.delta], n_rows * padded_out)
    for b in range(n_rows):
        for i in range(lo, min(hi, C)):
            x[b * C + i] += delta[b * padded_out + i]


@njit
def load_rows(m, base, source, stride, n_rows, scratch):
    """Copy the input of the matrix at `base` from a shared buffer to `scratch`; quantize it if the matrix is quantized.

    `source` is the address of the buffer, `stride` the number of floats between its rows.
    """
    in_features = m[base + MATRIX.in_features]
    x, source_rows = view_f32(scratch.x, n_rows * in_features), view_f32(source, n_rows * stride)
    for b in range(n_rows):
        for j in range(in_features):
            x[b * in_features + j] = source_rows[b * stride + j]
    if m[base + MATRIX.kind] != FP32:
        quantize_rows(m[base + MATRIX.kind], x, n_rows, in_features, scratch)


@njit
def apply_rope(head, D, cos, sin, position):
    """Rotate one head (D,) of q or k in place by RoPE. Dimension d is paired with d + D/2.

    `cos` and `sin` are the flattened (S, D/2) tables of `tinystories.position_tables.build_rope_tables`.
    """
    half = D // 2
    for d in range(half):
        a, b, c, s = head[d], head[d + half], cos[position * half + d], sin[position * half + d]
        head[d] = a * c - b * s
        head[d + half] = b * c + a * s


@njit
def norm_and_rope(m, c, eps, row, h, norm_weight, buffer, padded_out):
    """Apply QK-norm (if `norm_weight`, an address, is not 0) and RoPE to one head of q or k in place; return the head.

    `buffer` is the address of q or k, (B, padded_out). Classic models have neither, so their heads stay as they are.
    """
    D = m[MODEL.head_dim]
    head = view_f32(buffer + 4 * (row * padded_out + h * D), D)
    if m[MODEL.modern]:
        if norm_weight:
            layer_or_rms_norm(head, view_f32(norm_weight, D), head, m[MODEL.modern] != 0, eps, head)
        n = m[MODEL.n_ctx] * D // 2
        position = carray(to_i64_pointer(c[CALL.positions]), (c[CALL.n_rows],))[row]
        apply_rope(head, D, view_f32(m[MODEL.rope_cos], n), view_f32(m[MODEL.rope_sin], n), position)
    return head


@njit
def write_kv(m, c, layer_base, layer, eps, thread, n_threads):
    """Apply QK-norm and RoPE to q and k, and write the keys and values of all new tokens to the KV cache.

    The (row, KV head) pairs are split among the threads. A pair includes the query heads that use this KV head.
    """
    D, S, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_ctx], m[MODEL.n_kv_head], c[CALL.n_rows]
    heads_per_kv = m[MODEL.n_head] // n_kv_head
    positions = carray(to_i64_pointer(c[CALL.positions]), (n_rows,))
    slots = carray(to_i64_pointer(c[CALL.slots]), (n_rows,))
    padded_out = m[layer_base + LAYER.k + MATRIX.padded_out]
    for item in range(thread, n_rows * n_kv_head, n_threads):
        b, h = item // n_kv_head, item % n_kv_head
        for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
            norm_and_rope(
                m, c, eps, b, g, m[layer_base + LAYER.q_norm], c[CALL.q], m[layer_base + LAYER.q + MATRIX.padded_out]
            )
        key = norm_and_rope(m, c, eps, b, h, m[layer_base + LAYER.k_norm], c[CALL.k], padded_out)
        value = view_f32(c[CALL.v] + 4 * (b * padded_out + h * D), D)
        # The cache is (layers, slots, KV heads, S, D) fp32: bytes to [layer, slot, h, position].
        offset = 4 * D * (((layer * c[CALL.n_slots] + slots[b]) * n_kv_head + h) * S + positions[b])
        cached_key, cached_value = view_f32(c[CALL.keys] + offset, D), view_f32(c[CALL.values] + offset, D)
        for d in range(D):
            cached_key[d] = key[d]
            cached_value[d] = value[d]


@njit
def attention(m, c, layer_base, layer, scratch, thread, n_threads):
    """Causal attention: each row attends to the cached keys of its slot up to its own position, within the window.

    Writes softmax(q . k / sqrt(D)) v of every query head to c[CALL.attn_out], (B, n_head D). The (row, KV
    head) pairs are split among the threads, so that one thread reads the keys and values for all query heads of a
    group (GQA).
    """
    D, S, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_ctx], m[MODEL.n_kv_head], c[CALL.n_rows]
    heads_per_kv = m[MODEL.n_head] // n_kv_head
    positions = carray(to_i64_pointer(c[CALL.positions]), (n_rows,))
    slots = carray(to_i64_pointer(c[CALL.slots]), (n_rows,))
    padded_out, C = m[layer_base + LAYER.q + MATRIX.padded_out], m[layer_base + LAYER.o + MATRIX.in_features]
    scale = np.float32(1 / math.sqrt(D)) if m[MODEL.scale_scores] else np.float32(1)
    attn_weights = view_f32(scratch.x, S)
    for item in range(thread, n_rows * n_kv_head, n_threads):
        b, h = item // n_kv_head, item % n_kv_head
        kv_len = min(positions[b] + 1, m[layer_base + LAYER.window])
        window_start = positions[b] + 1 - kv_len
        offset = 4 * D * (S * ((layer * c[CALL.n_slots] + slots[b]) * n_kv_head + h) + window_start)
        keys, values = view_f32(c[CALL.keys] + offset, kv_len * D), view_f32(c[CALL.values] + offset, kv_len * D)
        for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
            q, y = (
                view_f32(c[CALL.q] + 4 * (b * padded_out + g * D), D),
                view_f32(c[CALL.attn_out] + 4 * (b * C + g * D), D),
            )
            # Scores q . k, and their maximum, which keeps the softmax from overflowing.
            max_score = np.float32(-np.inf)
            for s in range(kv_len):
                score = np.float32(0)
                for d in range(D):
                    score += q[d] * keys[s * D + d]
                attn_weights[s] = score * scale
                max_score = max(max_score, attn_weights[s])
            # Softmax, normalized only at the end: y is divided by the total.
            total = np.float32(0)
            for s in range(kv_len):
                attn_weights[s] = exp(attn_weights[s] - max_score)
                total += attn_weights[s]
            # y = weighted sum of the values.
            for d in range(D):
                y[d] = 0
            for s in range(kv_len):
                attn_weight = attn_weights[s]
                for d in range(D):
                    y[d] += attn_weight * values[s * D + d]
            for d in range(D):
                y[d] /= total


@njit
def feed_forward(m, c, layer_base, scratch, n_rows, thread, n_threads):
    """Compute this thread's columns of the MLP's hidden layer: silu(gate x) * up x (SwiGLU), or relu or gelu(up x).

    Reads x from `scratch` and writes to c[CALL.mlp_hidden]. The down projection follows after a barrier.
    """
    up = layer_base + LAYER.up
    padded_out = m[up + MATRIX.padded_out]
    x = view_f32(scratch.x, n_rows * m[up + MATRIX.in_features])
    lo, hi = matmul_rows(m, up, x, n_rows, opaque_zero(m), scratch, c[CALL.mlp_hidden], thread, n_threads)
    hidden = view_f32(c[CALL.mlp_hidden], n_rows * padded_out)
    # `gate` has the shape of `up`, so this thread computes the same columns lo:hi of both.
    if m[MODEL.modern]:
        matmul_rows(m, layer_base + LAYER.gate, x, n_rows, opaque_zero(m), scratch, c[CALL.gate], thread, n_threads)
        gate = view_f32(c[CALL.gate], n_rows * padded_out)
        for b in range(n_rows):
            for i in range(b * padded_out + lo, b * padded_out + hi):
                hidden[i] *= gate[i] / (np.float32(1) + exp(-gate[i]))
    elif m[MODEL.activation] == GELU_TANH:
        for b in range(n_rows):
            for i in range(b * padded_out + lo, b * padded_out + hi):
                hidden[i] = gelu_tanh(hidden[i])
    elif m[MODEL.activation] == GELU_ERF:
        for b in range(n_rows):
            for i in range(b * padded_out + lo, b * padded_out + hi):
                hidden[i] = gelu_erf(hidden[i])
    else:
        for b in range(n_rows):
            for i in range(b * padded_out + lo, b * padded_out + hi):
                hidden[i] = max(hidden[i], np.float32(0))


@njit
def norm_and_quantize(m, x, n_rows, weight, bias, base, eps, scratch):
    """Norm the rows of the residual stream x into `scratch` and quantize them for the matrix at `base`.

    `weight` and `bias` are addresses; `bias` is 0 for RMSNorm.
    """
    C = m[MODEL.n_embd]
    y, w = view_f32(scratch.x, n_rows * C), view_f32(weight, C)
    beta = view_f32(bias, C) if bias else w  # RMSNorm ignores it
    for b in range(n_rows):
        layer_or_rms_norm(x[b * C : (b + 1) * C], w, beta, m[MODEL.modern] == 1, eps, y[b * C : (b + 1) * C])
    if m[base + MATRIX.kind] != FP32:
        quantize_rows(m[base + MATRIX.kind], y, n_rows, C, scratch)


@njit
def forward(m, c, eps, thread, n_threads):
    """Run the forward pass of one call. All threads call it at the same time with the same tables.

    Six barriers per layer separate the writes of a shared buffer from its reads by other threads, and one at the end
    makes the logits complete. The barrier counter never goes back: the k-th barrier of a call waits until it reaches
    barrier_start + k * n_threads.
    """
    n_rows, C, counter = c[CALL.n_rows], m[MODEL.n_embd], c[CALL.barrier_counter]
    x = view_f32(c[CALL.x], n_rows * C)
    scratch_base, scratch_floats = (
        c[CALL.scratch] + thread * c[CALL.scratch_stride],
        c[CALL.scratch_width] * c[CALL.max_rows],
    )
    # The memory map is explained at `ThreadScratch`; `Workspace` in runtime.py allocates as many bytes.
    group_sums = scratch_base + 6 * scratch_floats + 4 * c[CALL.max_rows]
    scratch = ThreadScratch(
        scratch_base,
        scratch_base + 4 * scratch_floats,
        scratch_base + 6 * scratch_floats,
        group_sums,
        group_sums + 4 * scratch_floats // GROUP_SIZE,
    )
    barrier_start = c[CALL.barrier_start]
    for layer in range(m[MODEL.n_layer]):
        layer_base = MODEL.layers + layer * LAYER.size
        # Norm, then q, k and v.
        norm_and_quantize(
            m,
            x,
            n_rows,
            m[layer_base + LAYER.input_norm],
            m[layer_base + LAYER.input_norm_bias],
            layer_base + LAYER.q,
            eps,
            scratch,
        )
        normed_x = view_f32(scratch.x, n_rows * C)
        matmul_rows(m, layer_base + LAYER.q, normed_x, n_rows, opaque_zero(m), scratch, c[CALL.q], thread, n_threads)
        matmul_rows(m, layer_base + LAYER.k, normed_x, n_rows, opaque_zero(m), scratch, c[CALL.k], thread, n_threads)
        matmul_rows(m, layer_base + LAYER.v, normed_x, n_rows, opaque_zero(m), scratch, c[CALL.v], thread, n_threads)
        barrier_wait(counter, barrier_start + n_threads)  # q, k, v are complete
        write_kv(m, c, layer_base, layer, eps, thread, n_threads)
        barrier_wait(counter, barrier_start + 2 * n_threads)  # q is rotated, the KV cache is up to date
        attention(m, c, layer_base, layer, scratch, thread, n_threads)
        barrier_wait(counter, barrier_start + 3 * n_threads)  # attn_out is complete
        load_rows(
            m, layer_base + LAYER.o, c[CALL.attn_out], m[layer_base + LAYER.o + MATRIX.in_features], n_rows, scratch
        )
        matmul_add_residual(m, layer_base + LAYER.o, x, n_rows, scratch, c, thread, n_threads)
        barrier_wait(counter, barrier_start + 4 * n_threads)  # x is complete: residual stream after attention
        norm_and_quantize(
            m,
            x,
            n_rows,
            m[layer_base + LAYER.post_norm],
            m[layer_base + LAYER.post_norm_bias],
            layer_base + LAYER.up,
            eps,
            scratch,
        )
        feed_forward(m, c, layer_base, scratch, n_rows, thread, n_threads)
        barrier_wait(counter, barrier_start + 5 * n_threads)  # mlp_hidden is complete
        load_rows(
            m,
            layer_base + LAYER.down,
            c[CALL.mlp_hidden],
            m[layer_base + LAYER.up + MATRIX.padded_out],
            n_rows,
            scratch,
        )
        matmul_add_residual(m, layer_base + LAYER.down, x, n_rows, scratch, c, thread, n_threads)
        barrier_wait(counter, barrier_start + 6 * n_threads)  # x is complete: residual stream after the MLP
        barrier_start += 6 * n_threads
    # Final norm and LM head, only for the rows whose logits the caller wants.
    if c[CALL.first_logits_row] < n_rows:
        norm_and_quantize(m, x, n_rows, m[MODEL.norm], m[MODEL.norm_bias], MODEL.lm_head, eps, scratch)
        y = view_f32(scratch.x, n_rows * C)
        matmul_rows(m, MODEL.lm_head, y, n_rows, c[CALL.first_logits_row], scratch, c[CALL.logits], thread, n_threads)
    barrier_wait(counter, barrier_start + n_threads)


SIGNATURE = types.void(
    types.CPointer(types.int64), types.CPointer(types.int64), types.float64, types.int64, types.int64
)


def make_entry_point() -> Any:
    """Compile `forward` to a C function of (model table, call table, norm eps, thread, n_threads)."""

    @numba.cfunc(SIGNATURE, fastmath=FASTMATH, error_model="numpy")
    def tinystories_forward(model, call, eps, thread, n_threads):
        m = carray(model, (MODEL.layers,))  # enough to read n_layer, which gives the length of the whole table
        m = carray(model, (MODEL.layers + m[MODEL.n_layer] * LAYER.size,))
        forward(m, carray(call, (CALL.size,)), np.float32(eps), thread, n_threads)

    return tinystories_forward
