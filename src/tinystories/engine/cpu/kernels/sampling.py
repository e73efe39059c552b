"""Sampling of the next token of each row: bit for bit what `tinystories.generate.sampling` defines, without a sort.

The functions here are compiled without fast-math, so that every operation is rounded as NumPy rounds it. Weights are
integers, whose sums are exact in any order. Few ids can be sampled at all: those whose logit is close to the largest.
They are found block by block, and only their weights are computed.

P is the vocabulary size V, rounded up to whole blocks.
"""

import math
from typing import Any

import numba
import numpy as np
from numba import types

from tinystories.engine.cpu.kernels.layout import LOGIT_MARGIN, SAMPLING, SAMPLING_BLOCK
from tinystories.engine.cpu.kernels.memory import make_view, njit, view_f32, view_i8, view_i32, view_i64
from tinystories.engine.cpu.kernels.simd import bitcast_f32

view_f64 = make_view(types.float64)
# These are NumPy's integers, because Numba compiles a function once more for each literal that is passed to it.
BLOCK = np.int64(SAMPLING_BLOCK)
NUMBER, SUM = np.int64(0), np.int64(1)  # what the threshold of a filter is about
FIRST_BOUND = np.int64(1 << 22)
ONE = 1 << 30  # weight of the most likely id
MIN_EXPONENT = np.float32(-30)
INFINITY = 0x7F800000  # its bits; those of NaN without the sign are larger


@njit
def compute_weight(x):
    """Return 2^30 e^x for x <= 0, rounded to an integer; generate/sampling.py explains the method."""
    x = max(x, MIN_EXPONENT)
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = r * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return np.int32(np.rint(y * bitcast_f32((np.int32(n) + np.int32(157)) << np.int32(23))))


@njit
def copy_logits(logits, vocab_size, seen, penalty, z, padded):
    """Copy V logits to z (P,), padded with -inf, and apply the repetition penalty to the ids in `seen` (P,): addresses.

    Loops over a block see it as an array of its own: LLVM cannot vectorize indices that might be negative.
    """
    source, target = view_f32(logits, vocab_size), view_f32(z, padded)
    for i in range(padded):
        target[i] = -np.inf
    for i in range(vocab_size):
        target[i] = source[i]
    if penalty == np.float32(1):
        return
    for lo in range(0, padded, BLOCK):
        words, any_seen = view_i64(seen + lo, BLOCK // 8), 0
        for i in range(BLOCK // 8):
            any_seen |= words[i]
        if any_seen:
            block, is_seen = view_f32(z + 4 * lo, BLOCK), view_i8(seen + lo, BLOCK)
            for i in range(BLOCK):
                value = block[i]
                penalized = value / penalty if value > np.float32(0) else value * penalty
                block[i] = penalized if is_seen[i] else value


@njit
def find_maximum(z, n):
    """Return the largest of n values at the address z; NaN if one of them is NaN.

    Compared as integers, for LLVM does not vectorize the maximum of numbers that may be NaN: with the other bits of
    negative numbers inverted, the order of the bits is that of the numbers.
    """
    bits = view_i32(z, n)
    top, top_magnitude = np.int32(-(1 << 31)), np.int32(0)
    for i in range(n):
        magnitude = np.int32(bits[i] & 0x7FFFFFFF)
        top = max(top, np.int32(bits[i] ^ ((bits[i] >> 31) & 0x7FFFFFFF)))
        top_magnitude = max(top_magnitude, magnitude)
    if top_magnitude > INFINITY:
        return np.float32(np.nan)
    return bitcast_f32(np.int32(top ^ ((top >> 31) & 0x7FFFFFFF)))


@njit
def keep_at_least(z, n, low, ids):
    """Move the values from `low` to the front and write their indices to ids; return how many there are.

    z is the address of n values, which are whole blocks.
    """
    values, n_kept = view_f32(z, n), 0
    for lo in range(0, n, BLOCK):
        block, n_found = view_f32(z + 4 * lo, BLOCK), 0
        for i in range(BLOCK):
            n_found += block[i] >= low
        if n_found:
            for i in range(BLOCK):  # without branches: which values are kept cannot be predicted
                value = block[i]
                values[n_kept], ids[n_kept] = value, lo + i
                n_kept += value >= low
    return n_kept


@njit
def sum_at_least(w, threshold, kind):
    """Return the NUMBER of the weights from the threshold, or their SUM."""
    total = 0
    for i in range(len(w)):
        value = w[i] if kind else 1
        total += value if w[i] >= threshold else 0
    return total


@njit
def find_threshold(w, kind, goal, largest):
    """Return the largest threshold (or 0) such that the weights from it reach a goal, a NUMBER or a SUM.

    Found bit by bit, among the weights above a lower bound, which are copied to the scratch `largest`.
    """
    bound = FIRST_BOUND
    while bound and sum_at_least(w, bound, kind) < goal:
        bound >>= 8
    n = 0
    for i in range(len(w)):
        largest[n] = w[i]
        n += w[i] >= bound
    largest, threshold = largest[:n], 0
    for bit in range(30, -1, -1):
        candidate = threshold + (1 << bit)
        if sum_at_least(largest, candidate, kind) >= goal:
            threshold = candidate
    return threshold


@njit
def sample_index(w, vocab_size, settings, u, scratch):
    """Filter the weights and sample the index of one by inverting their cumulative distribution at u."""
    top_k, threshold = np.int64(settings[SAMPLING.top_k]), np.int64(0)
    if 0 < top_k < vocab_size:
        threshold = find_threshold(w, NUMBER, top_k, scratch)
    if settings[SAMPLING.top_p] < 1:
        goal = math.ceil(settings[SAMPLING.top_p] * sum_at_least(w, threshold, SUM))
        threshold = max(threshold, find_threshold(w, SUM, goal, scratch))
    threshold = max(threshold, math.ceil(np.float64(np.float32(settings[SAMPLING.min_p])) * ONE))
    target = u * sum_at_least(w, threshold, SUM)
    total, i = 0, 0
    while total <= target:  # u < 1, so the sum exceeds the target before the weights end
        total += w[i] if w[i] >= threshold else 0
        i += 1
    return i - 1


@njit
def sample_row(z, padded, vocab_size, settings, u, scratch):
    """Sample an id for the logits (P,) at z after the repetition penalty; -1 if the largest one is not finite.

    `scratch` is the address of weights (P,) int32 and ids (P,) int32.
    """
    top = find_maximum(z, padded)
    if not abs(top) < np.inf:
        return -1
    is_greedy, low = settings[SAMPLING.temperature] == 0, top
    if not is_greedy:
        low += np.float32(settings[SAMPLING.logit_gap]) - np.float32(LOGIT_MARGIN) * abs(top)
    ids = view_i32(scratch + 4 * padded, padded)
    n = keep_at_least(z, padded, low, ids)
    if is_greedy:
        return ids[0]
    logits, w, temperature = view_f32(z, n), view_i32(scratch, n), np.float32(settings[SAMPLING.temperature])
    for i in range(n):
        w[i] = compute_weight((logits[i] - top) / temperature)
    return ids[sample_index(w, vocab_size, settings, u, view_i32(z, n))]


SIGNATURE = types.void(*[types.int64] * 10)


def make_sampling_entry_point() -> Any:
    """Compile sampling to a C function of (B, V, P, logits, slots, settings, seen, u, scratch, sampled ids).

    All except the sizes are addresses: logits (B, V), slots (B,) int64, settings (slots, `SamplingLayout`) float64,
    seen (slots, P) bytes, u (B,), scratch (3, P) of 4 bytes, sampled ids (B,) int64, which it writes.
    """

    @numba.cfunc(SIGNATURE, error_model="numpy")
    def tinystories_sample(n_rows, vocab_size, padded, logits, slots, settings, seen, u, scratch, sampled):
        slot_of, number_of, sampled_ids = view_i64(slots, n_rows), view_f32(u, n_rows), view_i64(sampled, n_rows)
        for row in range(n_rows):
            slot = slot_of[row]
            own_settings = view_f64(settings + 8 * SAMPLING.size * slot, SAMPLING.size)
            penalty = np.float32(own_settings[SAMPLING.repetition_penalty])
            copy_logits(logits + 4 * vocab_size * row, vocab_size, seen + padded * slot, penalty, scratch, padded)
            sampled_ids[row] = sample_row(
                scratch, padded, vocab_size, own_settings, number_of[row], scratch + 4 * padded
            )

    return tinystories_sample
