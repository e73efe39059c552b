"""Attention: QK-norm and RoPE, the KV cache, and the attention itself."""

import math

import numpy as np

from tinystories.engine.cpu.kernels.layout import CALL, LAYER, MATRIX, MODEL
from tinystories.engine.cpu.kernels.memory import njit, view_f32, view_i64
from tinystories.engine.cpu.kernels.scalar_math import exp, layer_or_rms_norm


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
def norm_and_rope(m, c, b, h, norm_weight, buffer, padded_out, ctx):
    """Apply QK-norm (if `norm_weight`, an address, is not 0) and RoPE to one head of q or k in place; return the head.

    `buffer` is the address of q or k, (B, padded_out). Classic models have neither, so their heads stay as they are.
    """
    D = m[MODEL.head_dim]
    head = view_f32(buffer + 4 * (b * padded_out + h * D), D)
    if m[MODEL.modern]:
        if norm_weight:
            layer_or_rms_norm(head, view_f32(norm_weight, D), head, m[MODEL.modern] != 0, ctx.eps, head)
        n, position = m[MODEL.n_ctx] * D // 2, view_i64(c[CALL.positions], c[CALL.n_rows])[b]
        apply_rope(head, D, view_f32(m[MODEL.rope_cos], n), view_f32(m[MODEL.rope_sin], n), position)
    return head


@njit
def kv_offset(m, c, layer, b, h, position):
    """Return the offset in bytes of a position in the keys or values of KV head h, in the slot of row b.

    The cache is (layers, slots, KV heads, S, D) fp32.
    """
    slot = view_i64(c[CALL.slots], c[CALL.n_rows])[b]
    head_index = (layer * c[CALL.n_slots] + slot) * m[MODEL.n_kv_head] + h
    return 4 * m[MODEL.head_dim] * (head_index * m[MODEL.n_ctx] + position)


@njit
def write_kv(m, c, layer_base, layer, ctx):
    """Apply QK-norm and RoPE to q and k, and write the keys and values of all new tokens to the KV cache.

    The (row, KV head) pairs are split among the pieces. A pair includes the query heads that use this KV head.
    """
    D, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_kv_head], c[CALL.n_rows]
    heads_per_kv = m[MODEL.n_head] // n_kv_head
    positions = view_i64(c[CALL.positions], n_rows)
    q_width, k_width = m[layer_base + LAYER.q + MATRIX.padded_out], m[layer_base + LAYER.k + MATRIX.padded_out]
    for item in range(ctx.piece, n_rows * n_kv_head, ctx.n_pieces):
        b, h = item // n_kv_head, item % n_kv_head
        for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
            norm_and_rope(m, c, b, g, m[layer_base + LAYER.q_norm], c[CALL.q], q_width, ctx)
        key = norm_and_rope(m, c, b, h, m[layer_base + LAYER.k_norm], c[CALL.k], k_width, ctx)
        value = view_f32(c[CALL.v] + 4 * (b * k_width + h * D), D)
        offset = kv_offset(m, c, layer, b, h, positions[b])
        cached_key, cached_value = view_f32(c[CALL.keys] + offset, D), view_f32(c[CALL.values] + offset, D)
        for d in range(D):
            cached_key[d] = key[d]
            cached_value[d] = value[d]


@njit
def attention(m, c, layer_base, layer, ctx):
    """Causal attention: each row attends to the cached keys of its slot up to its own position, within the window.

    Writes softmax(q . k / sqrt(D)) v of every query head to c[CALL.attn_out], (B, n_head D). The (row, KV
    head) pairs are split among the pieces, so that one thread reads the keys and values for all query heads of a
    group (GQA).
    """
    D, n_kv_head, n_rows = m[MODEL.head_dim], m[MODEL.n_kv_head], c[CALL.n_rows]
    heads_per_kv = m[MODEL.n_head] // n_kv_head
    positions = view_i64(c[CALL.positions], n_rows)
    q_width, y_width = m[layer_base + LAYER.q + MATRIX.padded_out], m[layer_base + LAYER.o + MATRIX.in_features]
    scale = np.float32(1 / math.sqrt(D)) if m[MODEL.scale_scores] else np.float32(1)
    attn_weights = view_f32(ctx.x, m[MODEL.n_ctx])
    for item in range(ctx.piece, n_rows * n_kv_head, ctx.n_pieces):
        b, h = item // n_kv_head, item % n_kv_head
        kv_len = min(positions[b] + 1, m[layer_base + LAYER.window])
        offset = kv_offset(m, c, layer, b, h, positions[b] + 1 - kv_len)
        keys, values = view_f32(c[CALL.keys] + offset, kv_len * D), view_f32(c[CALL.values] + offset, kv_len * D)
        for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
            q = view_f32(c[CALL.q] + 4 * (b * q_width + g * D), D)
            y = view_f32(c[CALL.attn_out] + 4 * (b * y_width + g * D), D)
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
