"""One token through a block of either architecture, for few rows. Numba compiles each once and caches it on disk.

Decoding reads every weight once for each token and does little else. All threads read at once in `linear`, and a block
is one call, since a call from Python costs as much as a small product. Each sum is made by one thread in one order, so
results depend neither on the number of threads nor on the other rows.

Letters: B rows, C = n_embd, H heads, D = head_dim, S = n_ctx places of the cache, F = n_ff. Weights are (outer, inner).
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FAST = {"reassoc", "nsz", "contract"}  # lets sums be vectorised; infinities and NaN keep their meaning
compiled = numba.njit(fastmath=FAST, cache=True)
parallel = numba.njit(fastmath=FAST, cache=True, parallel=True)


class ClassicWeights(NamedTuple):
    """Weights of a `classic` block: vectors of norms and biases, matrices of the rest."""

    input_norm: Floats
    input_norm_bias: Floats
    q: Floats
    k: Floats
    v: Floats
    o: Floats
    o_bias: Floats
    post_norm: Floats
    post_norm_bias: Floats
    up: Floats
    up_bias: Floats
    down: Floats
    down_bias: Floats


class ModernWeights(NamedTuple):
    """Weights of a `modern` block; q_norm and k_norm are empty where the model has none."""

    input_norm: Floats
    q: Floats
    k: Floats
    v: Floats
    q_norm: Floats
    k_norm: Floats
    o: Floats
    post_norm: Floats
    gate: Floats
    up: Floats
    down: Floats


@parallel
def linear(x: Floats, weight: Floats) -> Floats:
    """x (B, inner) @ weight.T; each row of the weight is read from memory once."""
    n_rows, inner = x.shape
    y = np.empty((n_rows, weight.shape[0]), dtype=np.float32)
    for i in numba.prange(weight.shape[0]):
        for b in range(n_rows):
            total = np.float32(0)
            for j in range(inner):
                total += weight[i, j] * x[b, j]
            y[b, i] = total
    return y


@parallel
def attend(q: Floats, k: Floats, v: Floats, keys: Floats, values: Floats, positions: Ints) -> Floats:
    """Store k and v (B, Hkv, D) of one new token in each row, then let q (B, H, D) attend to all up to it.

    keys, values (B, Hkv, S, D); positions (B,) is where each row's new token stands. Returns (B, H, D).
    """
    n_kv_head = k.shape[1]
    y = np.empty(q.shape, dtype=np.float32)
    for item in numba.prange(k.shape[0] * n_kv_head):
        attend_one(item // n_kv_head, item % n_kv_head, q, k, v, keys, values, positions, y)
    return y


@compiled
def attend_one(
    b: int, h: int, q: Floats, k: Floats, v: Floats, keys: Floats, values: Floats, positions: Ints, y: Floats
) -> None:
    """The part of `attend` that reads one row's one head of keys; several heads of q may share it."""
    head_dim = k.shape[2]
    group = q.shape[1] // k.shape[1]
    seen = positions[b] + 1
    for d in range(head_dim):
        keys[b, h, seen - 1, d] = k[b, h, d]
        values[b, h, seen - 1, d] = v[b, h, d]
    scale = np.float32(1 / math.sqrt(head_dim))
    weights = np.empty(seen, dtype=np.float32)
    for g in range(h * group, (h + 1) * group):
        highest = np.float32(-np.inf)
        for s in range(seen):
            score = np.float32(0)
            for d in range(head_dim):
                score += q[b, g, d] * keys[b, h, s, d]
            weights[s] = score * scale
            highest = max(highest, weights[s])
        total = np.float32(0)
        for s in range(seen):
            weights[s] = math.exp(weights[s] - highest)
            total += weights[s]
        for d in range(head_dim):
            y[b, g, d] = 0
        for s in range(seen):
            weight = weights[s] / total
            for d in range(head_dim):
                y[b, g, d] += weight * values[b, h, s, d]


@compiled
def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Over the last axis of x (rows, width)."""
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        mean = np.float32(0)
        for j in range(x.shape[1]):
            mean += x[b, j]
        mean /= np.float32(x.shape[1])
        variance = np.float32(0)
        for j in range(x.shape[1]):
            variance += (x[b, j] - mean) * (x[b, j] - mean)
        scale = np.float32(1 / math.sqrt(variance / x.shape[1] + eps))
        for j in range(x.shape[1]):
            y[b, j] = (x[b, j] - mean) * scale * weight[j] + bias[j]
    return y


@compiled
def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Over the last axis of x (rows, width)."""
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        total = np.float32(0)
        for j in range(x.shape[1]):
            total += x[b, j] * x[b, j]
        scale = np.float32(1 / math.sqrt(total / x.shape[1] + eps))
        for j in range(x.shape[1]):
            y[b, j] = x[b, j] * scale * weight[j]
    return y


@compiled
def rotated(heads: Floats, cos: Floats, sin: Floats, positions: Ints) -> Floats:
    """heads (B, H, D), each turned to its row's position; tables (S, D) as in `model.positions.rotary_tables`."""
    n_rows, n_head, head_dim = heads.shape
    y = np.empty_like(heads)
    half = head_dim // 2
    for b in range(n_rows):
        p = positions[b]
        for h in range(n_head):
            for d in range(half):
                y[b, h, d] = heads[b, h, d] * cos[p, d] + heads[b, h, d + half] * sin[p, d]
                y[b, h, d + half] = heads[b, h, d + half] * cos[p, d + half] + heads[b, h, d] * sin[p, d + half]
    return y


@compiled
def classic_block(x: Floats, w: ClassicWeights, eps: float, keys: Floats, values: Floats, positions: Ints) -> None:
    """x (B, C) becomes the residual stream after the block; its keys and values are stored in the cache."""
    n_rows, n_head, head_dim = len(x), keys.shape[1], keys.shape[3]
    h = layer_norm(x, w.input_norm, w.input_norm_bias, eps)
    q = linear(h, w.q).reshape(n_rows, n_head, head_dim)
    k = linear(h, w.k).reshape(n_rows, n_head, head_dim)
    v = linear(h, w.v).reshape(n_rows, n_head, head_dim)
    x += linear(attend(q, k, v, keys, values, positions).reshape(x.shape), w.o) + w.o_bias
    h = linear(layer_norm(x, w.post_norm, w.post_norm_bias, eps), w.up) + w.up_bias
    x += linear(np.maximum(h, np.float32(0)), w.down) + w.down_bias


@compiled
def modern_block(
    x: Floats, w: ModernWeights, eps: float, cos: Floats, sin: Floats, keys: Floats, values: Floats, positions: Ints
) -> None:
    """x (B, C) becomes the residual stream after the block; its keys and values are stored in the cache."""
    n_rows, n_kv_head, head_dim = len(x), keys.shape[1], keys.shape[3]
    h = rms_norm(x, w.input_norm, eps)
    q, k = linear(h, w.q), linear(h, w.k)
    if len(w.q_norm):
        q = rms_norm(q.reshape(-1, head_dim), w.q_norm, eps)
        k = rms_norm(k.reshape(-1, head_dim), w.k_norm, eps)
    q = rotated(q.reshape(n_rows, -1, head_dim), cos, sin, positions)
    k = rotated(k.reshape(n_rows, n_kv_head, head_dim), cos, sin, positions)
    v = linear(h, w.v).reshape(n_rows, n_kv_head, head_dim)
    x += linear(attend(q, k, v, keys, values, positions).reshape(n_rows, -1), w.o)
    h = rms_norm(x, w.post_norm, eps)
    gate = linear(h, w.gate)
    x += linear(gate / (np.float32(1) + np.exp(-gate)) * linear(h, w.up), w.down)
