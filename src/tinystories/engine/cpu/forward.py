"""Rows of new tokens through the whole model, in one call for each thread. Numba makes machine code of this once.

Decoding reads every weight once for each token and does little else, so a thread must never wait long: it computes its
own rows of every matrix, and all meet at a barrier only where they need each other's results. What is small (norms,
rounding of x) every thread does for itself. Each sum is made by one thread in one order, so results depend neither on
the number of threads nor on the other rows.

Only the compiler of `native` imports this module. Numbers reach it as two tables of 64-bit integers, addresses among
them, which `plan` fills: `m` describes the model, `c` this call.

Letters: B rows of tokens, C = n_embd, H heads, D = head_dim, S = n_ctx places of the cache. Weights are (outer, inner).
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray, types

from tinystories.engine.cpu.fields import BLOCK, CALL, FP32, GELU_ERF, GELU_TANH, GROUP, INT8, LAYER, MATRIX, MODEL
from tinystories.engine.cpu.intrinsics import (
    float_of_bits,
    fp32_block,
    int4_block,
    int8_block,
    pointer_of,
    wait_for_all,
)

SMALLEST = np.float32(1e-30)  # rows of x that are smaller count as zeros: the inverse would overflow
FAST = {"reassoc", "nsz", "contract"}  # lets sums be vectorised; infinities and NaN keep their meaning
compiled = numba.njit(fastmath=FAST, error_model="numpy")

float_pointer, long_pointer = pointer_of(types.float32), pointer_of(types.int64)
byte_pointer, word_pointer, int_pointer = pointer_of(types.int8), pointer_of(types.int16), pointer_of(types.int32)
int8_one, int8_four = int8_block(1), int8_block(4)
int4_one, int4_four = int4_block(1), int4_block(4)
fp32_one, fp32_four, fp32_four_two = fp32_block(1, 1), fp32_block(4, 1), fp32_block(4, 2)


class Own(NamedTuple):
    """Addresses of a thread's own memory: rows of x, the same as integers, their scales; their groups' sums, scales."""

    x: int
    words: int
    scales: int
    sums: int
    group_scales: int


@compiled
def floats(address, n):
    return carray(float_pointer(address), (n,))


@compiled
def exp(x):
    """e^x within 2e-7 of itself; as at -87.3 below it, as at 88 above. Cephes' polynomial, which LLVM can vectorise."""
    x = min(max(x, np.float32(-87.3)), np.float32(88))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@compiled
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel 2016."""
    return x / (np.float32(1) + exp(x * (np.float32(-1.5957691216) + np.float32(-0.0713548163) * x * x)))


@compiled
def gelu_erf(x):
    """x (1 + erf(x / sqrt(2))) / 2 within 1e-7 |x|: 7.1.26 of Abramowitz and Stegun."""
    t = np.float32(1) / (np.float32(1) + np.float32(0.23164189) * abs(x))
    y = np.float32(1.061405429)
    y = y * t + np.float32(-1.453152027)
    y = y * t + np.float32(1.421413741)
    y = y * t + np.float32(-0.284496736)
    y = y * t + np.float32(0.254829592)
    tail = np.float32(0.5) * y * t * exp(np.float32(-0.5) * x * x)
    return x * (np.float32(1) - tail if x > np.float32(0) else tail)


@compiled
def normed(x, weight, bias, modern, eps, y):
    """RMSNorm or LayerNorm of one row."""
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


@compiled
def round_rows(kind, x, n_rows, inner, own):
    """Integers for each row of x (B, inner), as a matrix of this kind needs them; into `own`."""
    for b in range(n_rows):
        if kind == INT8:
            round_to_words(x[b * inner : (b + 1) * inner], b, own)
        else:
            round_to_bytes(x[b * inner : (b + 1) * inner], b, own)


@compiled
def round_to_words(x, b, own):
    """16-bit integers of a row and its scale.

    The largest integer is such that no sum of products with 8-bit weights leaves 32 bits. The scale of a row that is
    not finite is NaN, and so is all that comes of it.
    """
    inner = len(x)
    limit = np.float32(min(32767, (2**31 - 1) // (127 * inner)))
    width = (inner + GROUP - 1) // GROUP * GROUP
    words = carray(word_pointer(own.words + 2 * width * b), (width,))
    highest, spoilt = np.float32(0), np.float32(0)
    for j in range(inner):
        highest = max(highest, abs(x[j]))
        spoilt += x[j] * np.float32(0)  # NaN where x holds NaN or an infinity
    factor = limit / highest if highest > SMALLEST and spoilt == 0 else np.float32(0)
    for j in range(inner):
        words[j] = np.int16(np.rint(x[j] * factor)) if factor > 0 else np.int16(0)
    for j in range(inner, width):
        words[j] = 0
    floats(own.scales, b + 1)[b] = highest / limit + spoilt


@compiled
def round_to_bytes(x, b, own):
    """8-bit integers of a row, with a scale and the sum of the integers for each group of columns; NaN as above."""
    inner = len(x)
    groups = (inner + GROUP - 1) // GROUP
    values = carray(byte_pointer(own.words + GROUP * groups * b), (groups * GROUP,))
    sums = carray(int_pointer(own.sums + 4 * groups * b), (groups,))
    scales = floats(own.group_scales + 4 * groups * b, groups)
    for g in range(groups):
        lo, hi = g * GROUP, min((g + 1) * GROUP, inner)
        highest, spoilt = np.float32(0), np.float32(0)
        for j in range(lo, hi):
            highest = max(highest, abs(x[j]))
            spoilt += x[j] * np.float32(0)
        factor = np.float32(127) / highest if highest > SMALLEST and spoilt == 0 else np.float32(0)
        total = np.int32(0)
        for j in range(lo, hi):
            value = np.int32(np.rint(x[j] * factor)) if factor > 0 else np.int32(0)
            values[j] = value
            total += value
        for j in range(hi, lo + GROUP):
            values[j] = 0
        sums[g] = total
        scales[g] = highest / np.float32(127) + spoilt


@compiled
def product_fp32(weights, inner, lo, hi, x, n_rows, first, y, y_address, outer):
    """y[b, lo:hi] = rows lo..hi-1 of the matrix at an address . x[b]: four rows by two of x at a time."""
    x_address, eighths, stride = x.ctypes.data, inner // 8, 4 * inner
    i = lo
    while i < hi:
        count = 4 if i + 4 <= hi else 1
        w_at = weights + stride * i
        b = first
        while b < n_rows:
            both = count == 4 and b + 2 <= n_rows
            x_at, y_at = x_address + stride * b, y_address + 4 * (b * outer + i)
            if both:
                fp32_four_two(w_at, stride, x_at, stride, eighths, y_at, 4 * outer)
            elif count == 4:
                fp32_four(w_at, stride, x_at, stride, eighths, y_at, 4 * outer)
            else:
                fp32_one(w_at, stride, x_at, stride, eighths, y_at, 4 * outer)
            b += 2 if both else 1
        i += count
    if inner % 8:
        w = floats(weights, hi * inner)
        for i in range(lo, hi):
            for b in range(first, n_rows):
                for j in range(inner // 8 * 8, inner):
                    y[b * outer + i] += w[i * inner + j] * x[b * inner + j]


@compiled
def product(m, at, x, n_rows, first, own, y_address, thread, n_threads):
    """This thread's rows of a matrix times x: y[b, lo:hi] for b from `first` on, bias included; returns (lo, hi).

    `at`: where the matrix stands in the table; x (B, inner) fp32, and rounded in `own` where the matrix is packed;
    y (B, outer) with the outer size of the table.
    """
    kind, outer, inner, rows = m[at + MATRIX.kind], m[at + MATRIX.outer], m[at + MATRIX.inner], m[at + MATRIX.rows]
    blocks = outer // BLOCK
    lo, hi = blocks * thread // n_threads * BLOCK, blocks * (thread + 1) // n_threads * BLOCK
    weights, scales = m[at + MATRIX.weights], m[at + MATRIX.scales]
    groups = (inner + GROUP - 1) // GROUP
    x_stride, y_stride = (2 if kind == INT8 else 1) * GROUP * groups, 4 * outer
    y = floats(y_address, n_rows * outer)
    if kind == FP32:
        product_fp32(weights, inner, lo, min(hi, rows), x, n_rows, first, y, y_address, outer)
    else:
        for i in range(lo, hi, BLOCK):
            b = first
            while b < n_rows:
                four = b + 4 <= n_rows
                x_at, y_at = own.words + b * x_stride, y_address + b * y_stride + 4 * i
                s_at = own.scales + 4 * b
                if kind == INT8:
                    eighths = (inner + 7) // 8
                    w_at, c_at = weights + 8 * eighths * i, scales + 4 * i
                    if four:
                        int8_four(w_at, x_at, x_stride, eighths, y_at, y_stride, c_at, s_at)
                    else:
                        int8_one(w_at, x_at, x_stride, eighths, y_at, y_stride, c_at, s_at)
                else:
                    w_at, c_at = weights + GROUP // 2 * groups * i, scales + 2 * groups * i
                    s_at, g_at = own.group_scales + 4 * groups * b, own.sums + 4 * groups * b
                    if four:
                        int4_four(w_at, x_at, x_stride, groups, y_at, y_stride, c_at, s_at, g_at, 4 * groups)
                    else:
                        int4_one(w_at, x_at, x_stride, groups, y_at, y_stride, c_at, s_at, g_at, 4 * groups)
                b += 4 if four else 1
    if m[at + MATRIX.bias]:
        bias = floats(m[at + MATRIX.bias], rows)
        for b in range(first, n_rows):
            for i in range(lo, min(hi, rows)):
                y[b * outer + i] += bias[i]
    return lo, hi


@compiled
def all_rows(m):
    """0, but no constant: for one Numba would make a second `product`."""
    return m[MODEL.n_layer] * 0


@compiled
def onto_residual(m, at, x, n_rows, own, c, thread, n_threads):
    """x (B, C) += matrix times what `own` holds, this thread's part of C."""
    C, outer = m[MODEL.n_embd], m[at + MATRIX.outer]
    lo, hi = product(
        m, at, floats(own.x, n_rows * m[at + MATRIX.inner]), n_rows, all_rows(m), own, c[CALL.added], thread, n_threads
    )
    added = floats(c[CALL.added], n_rows * outer)
    for b in range(n_rows):
        for i in range(lo, min(hi, C)):
            x[b * C + i] += added[b * outer + i]


@compiled
def take(m, at, source, stride, n_rows, own):
    """Copy rows of a shared buffer (stride floats from row to row) to where this thread reads x, rounded if packed."""
    inner = m[at + MATRIX.inner]
    x, shared = floats(own.x, n_rows * inner), floats(source, n_rows * stride)
    for b in range(n_rows):
        for j in range(inner):
            x[b * inner + j] = shared[b * stride + j]
    if m[at + MATRIX.kind] != FP32:
        round_rows(m[at + MATRIX.kind], x, n_rows, inner, own)


@compiled
def turn(head, D, cos, sin, position):
    """Rotate one head in place to its position; tables (S, D/2) as in `tinystories.positions`."""
    half = D // 2
    for d in range(half):
        a, b, c, s = head[d], head[d + half], cos[position * half + d], sin[position * half + d]
        head[d] = a * c - b * s
        head[d + half] = b * c + a * s


@compiled
def place(m, c, eps, row, h, weights, buffer, outer):
    """Norm and rotate head h of a row of q or k in place; returns it as an array."""
    D = m[MODEL.head_dim]
    head = floats(buffer + 4 * (row * outer + h * D), D)
    if m[MODEL.modern]:
        if weights:
            normed(head, floats(weights, D), head, m[MODEL.modern] != 0, eps, head)
        n = m[MODEL.n_ctx] * D // 2
        position = carray(long_pointer(c[CALL.positions]), (c[CALL.n_rows],))[row]
        turn(head, D, floats(m[MODEL.cos], n), floats(m[MODEL.sin], n), position)
    return head


@compiled
def store(m, c, at, layer, eps, thread, n_threads):
    """Norms and rotations of q and k; keys and values of all new tokens go into the cache."""
    D, S, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_ctx], m[MODEL.n_kv_head], c[CALL.n_rows]
    group = m[MODEL.n_head] // n_kv_head
    positions = carray(long_pointer(c[CALL.positions]), (n_rows,))
    slots = carray(long_pointer(c[CALL.slots]), (n_rows,))
    outer = m[at + LAYER.k + MATRIX.outer]
    for item in range(thread, n_rows * n_kv_head, n_threads):
        b, h = item // n_kv_head, item % n_kv_head
        for g in range(h * group, (h + 1) * group):
            place(m, c, eps, b, g, m[at + LAYER.q_norm], c[CALL.q], m[at + LAYER.q + MATRIX.outer])
        key = place(m, c, eps, b, h, m[at + LAYER.k_norm], c[CALL.k], outer)
        value = floats(c[CALL.v] + 4 * (b * outer + h * D), D)
        offset = 4 * D * (((layer * c[CALL.n_slots] + slots[b]) * n_kv_head + h) * S + positions[b])
        kept_key, kept_value = floats(c[CALL.keys] + offset, D), floats(c[CALL.values] + offset, D)
        for d in range(D):
            kept_key[d] = key[d]
            kept_value[d] = value[d]


@compiled
def attend(m, c, at, layer, own, thread, n_threads):
    """Each row's heads over the keys of its slot up to its own position, as far back as the block's window."""
    D, S, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_ctx], m[MODEL.n_kv_head], c[CALL.n_rows]
    group = m[MODEL.n_head] // n_kv_head
    positions = carray(long_pointer(c[CALL.positions]), (n_rows,))
    slots = carray(long_pointer(c[CALL.slots]), (n_rows,))
    outer, C = m[at + LAYER.q + MATRIX.outer], m[at + LAYER.o + MATRIX.inner]
    scale = np.float32(1 / math.sqrt(D)) if m[MODEL.scaled] else np.float32(1)
    weights = floats(own.x, S)
    for item in range(thread, n_rows * n_kv_head, n_threads):
        b, h = item // n_kv_head, item % n_kv_head
        seen = min(positions[b] + 1, m[at + LAYER.window])
        first = positions[b] + 1 - seen
        offset = 4 * D * (S * ((layer * c[CALL.n_slots] + slots[b]) * n_kv_head + h) + first)
        keys, values = floats(c[CALL.keys] + offset, seen * D), floats(c[CALL.values] + offset, seen * D)
        for g in range(h * group, (h + 1) * group):
            q, y = floats(c[CALL.q] + 4 * (b * outer + g * D), D), floats(c[CALL.mixed] + 4 * (b * C + g * D), D)
            highest = np.float32(-np.inf)
            for s in range(seen):
                score = np.float32(0)
                for d in range(D):
                    score += q[d] * keys[s * D + d]
                weights[s] = score * scale
                highest = max(highest, weights[s])
            total = np.float32(0)
            for s in range(seen):
                weights[s] = exp(weights[s] - highest)
                total += weights[s]
            for d in range(D):
                y[d] = 0
            for s in range(seen):
                weight = weights[s]
                for d in range(D):
                    y[d] += weight * values[s * D + d]
            for d in range(D):
                y[d] /= total


@compiled
def activate(m, c, at, own, n_rows, thread, n_threads):
    """This thread's part of the feed-forward's inner row: relu or gelu(up x), or silu(gate x) * up x."""
    up = at + LAYER.up
    outer = m[up + MATRIX.outer]
    x = floats(own.x, n_rows * m[up + MATRIX.inner])
    lo, hi = product(m, up, x, n_rows, all_rows(m), own, c[CALL.inner], thread, n_threads)
    inner = floats(c[CALL.inner], n_rows * outer)
    if m[MODEL.modern]:
        product(m, at + LAYER.gate, x, n_rows, all_rows(m), own, c[CALL.gate], thread, n_threads)
        gate = floats(c[CALL.gate], n_rows * outer)
        for b in range(n_rows):
            for i in range(b * outer + lo, b * outer + hi):
                inner[i] *= gate[i] / (np.float32(1) + exp(-gate[i]))
    elif m[MODEL.activation] == GELU_TANH:
        for b in range(n_rows):
            for i in range(b * outer + lo, b * outer + hi):
                inner[i] = gelu_tanh(inner[i])
    elif m[MODEL.activation] == GELU_ERF:
        for b in range(n_rows):
            for i in range(b * outer + lo, b * outer + hi):
                inner[i] = gelu_erf(inner[i])
    else:
        for b in range(n_rows):
            for i in range(b * outer + lo, b * outer + hi):
                inner[i] = max(inner[i], np.float32(0))


@compiled
def norm_and_round(m, x, n_rows, weight, bias, at, eps, own):
    """The residual stream's rows normed into `own`, rounded as the matrix at `at` needs them."""
    C = m[MODEL.n_embd]
    y, w = floats(own.x, n_rows * C), floats(weight, C)
    beta = floats(bias, C) if bias else w
    for b in range(n_rows):
        normed(x[b * C : (b + 1) * C], w, beta, m[MODEL.modern] == 1, eps, y[b * C : (b + 1) * C])
    if m[at + MATRIX.kind] != FP32:
        round_rows(m[at + MATRIX.kind], y, n_rows, C, own)


@compiled
def forward(m, c, eps, thread, n_threads):
    """What one of the threads does; all of them are called at once with the same tables."""
    n_rows, C, counter = c[CALL.n_rows], m[MODEL.n_embd], c[CALL.counter]
    x = floats(c[CALL.x], n_rows * C)
    base, room = c[CALL.own] + thread * c[CALL.own_size], c[CALL.width] * c[CALL.capacity]
    sums = base + 6 * room + 4 * c[CALL.capacity]
    own = Own(base, base + 4 * room, base + 6 * room, sums, sums + 4 * room // GROUP)
    arrived = c[CALL.arrived]
    for layer in range(m[MODEL.n_layer]):
        at = MODEL.layers + layer * LAYER.size
        norm_and_round(m, x, n_rows, m[at + LAYER.input_norm], m[at + LAYER.input_norm_bias], at + LAYER.q, eps, own)
        normal = floats(own.x, n_rows * C)
        product(m, at + LAYER.q, normal, n_rows, all_rows(m), own, c[CALL.q], thread, n_threads)
        product(m, at + LAYER.k, normal, n_rows, all_rows(m), own, c[CALL.k], thread, n_threads)
        product(m, at + LAYER.v, normal, n_rows, all_rows(m), own, c[CALL.v], thread, n_threads)
        wait_for_all(counter, arrived + n_threads)
        store(m, c, at, layer, eps, thread, n_threads)
        wait_for_all(counter, arrived + 2 * n_threads)
        attend(m, c, at, layer, own, thread, n_threads)
        wait_for_all(counter, arrived + 3 * n_threads)
        take(m, at + LAYER.o, c[CALL.mixed], m[at + LAYER.o + MATRIX.inner], n_rows, own)
        onto_residual(m, at + LAYER.o, x, n_rows, own, c, thread, n_threads)
        wait_for_all(counter, arrived + 4 * n_threads)
        norm_and_round(m, x, n_rows, m[at + LAYER.post_norm], m[at + LAYER.post_norm_bias], at + LAYER.up, eps, own)
        activate(m, c, at, own, n_rows, thread, n_threads)
        wait_for_all(counter, arrived + 5 * n_threads)
        take(m, at + LAYER.down, c[CALL.inner], m[at + LAYER.up + MATRIX.outer], n_rows, own)
        onto_residual(m, at + LAYER.down, x, n_rows, own, c, thread, n_threads)
        wait_for_all(counter, arrived + 6 * n_threads)
        arrived += 6 * n_threads
    if c[CALL.first] < n_rows:
        norm_and_round(m, x, n_rows, m[MODEL.norm], m[MODEL.norm_bias], MODEL.head, eps, own)
        y = floats(own.x, n_rows * C)
        product(m, MODEL.head, y, n_rows, c[CALL.first], own, c[CALL.logits], thread, n_threads)
    wait_for_all(counter, arrived + n_threads)


SIGNATURE = types.void(
    types.CPointer(types.int64), types.CPointer(types.int64), types.float64, types.int64, types.int64
)


def make_entry() -> Any:
    """The function that machine code is made of: model table, call table, eps, thread, threads."""

    @numba.cfunc(SIGNATURE, fastmath=FAST, error_model="numpy")
    def tinystories_forward(model, call, eps, thread, n_threads):
        m = carray(model, (MODEL.layers,))
        m = carray(model, (MODEL.layers + m[MODEL.n_layer] * LAYER.size,))
        forward(m, carray(call, (CALL.size,)), np.float32(eps), thread, n_threads)

    return tinystories_forward
