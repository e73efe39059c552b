"""Attention: QK-norm and RoPE, the KV cache, and the attention itself."""

import math
from typing import Any

import numpy as np

from tinystories.engine.cpu.kernels.attention_simd import LANES, make_score_kernel, make_value_kernel
from tinystories.engine.cpu.kernels.elementwise import (
    convert_to_f16,
    copy_f32,
    divide_f32,
    exp_of_scores,
    max_ordered_bits,
    rotate_pairs,
    sum_f32,
)
from tinystories.engine.cpu.kernels.layout import CALL, LAYER, MATRIX, MODEL, SCORE_CHUNK, TILE_ROWS
from tinystories.engine.cpu.kernels.memory import fill_zeros, njit, view_f32, view_i64
from tinystories.engine.cpu.kernels.norm import layer_or_rms_norm
from tinystories.engine.cpu.kernels.simd import F32, I16, bitcast_f32


@njit
def norm_and_rope(m, c, b, h, norm_weight, buffer, padded_out, ctx):
    """Apply QK-norm (if `norm_weight`, an address, is not 0) and RoPE to one head of q or k in place.

    `buffer` is the address of q or k, (B, padded_out). Returns the address of the head, D floats. Classic models have
    neither, so their heads stay as they are.
    """
    D = m[MODEL.head_dim]
    head = buffer + 4 * (b * padded_out + h * D)
    if m[MODEL.modern]:
        if norm_weight:
            layer_or_rms_norm(head, D, norm_weight, norm_weight, True, ctx.eps, head)
        # Dimension d is paired with d + D/2. The tables are (S, D/2), see `position_tables.build_rope_tables`.
        half = D // 2
        row = 4 * half * view_i64(c[CALL.positions], c[CALL.n_rows])[b]
        pair = (head, head + 4 * half)
        rotate_pairs(pair, (head, head + 4 * half, m[MODEL.rope_cos] + row, m[MODEL.rope_sin] + row), half, ())
    return head


@njit
def kv_offset(m, c, layer, b, h, position, n_bytes):
    """Return the offset in bytes of a position in the keys or values of KV head h, in the slot of row b.

    The cache is (layers, slots, KV heads, S, D) with numbers of n_bytes.
    """
    slot = view_i64(c[CALL.slots], c[CALL.n_rows])[b]
    head_index = (layer * c[CALL.n_slots] + slot) * m[MODEL.n_kv_head] + h
    return n_bytes * m[MODEL.head_dim] * (head_index * m[MODEL.n_ctx] + position)


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
        value = c[CALL.v] + 4 * (b * k_width + h * D)
        offset = kv_offset(m, c, layer, b, h, positions[b], 2 if c[CALL.kv_is_f16] else 4)
        if c[CALL.kv_is_f16]:
            convert_to_f16((c[CALL.keys] + offset,), (key,), D, ())
            convert_to_f16((c[CALL.values] + offset,), (value,), D, ())
        else:
            copy_f32((c[CALL.keys] + offset,), (key,), D, ())
            copy_f32((c[CALL.values] + offset,), (value,), D, ())


@njit
def softmax(scores, n, lo, hi, scale):
    """Replace n scores (fp32, at an address) by e^(scale (score - maximum)), and those outside lo..hi-1 by 0.

    Returns the sum; the caller divides by it. n is a multiple of SCORE_CHUNK; scores outside lo..hi-1 may be anything.
    """
    bits = max_ordered_bits(scores + 4 * lo, hi - lo, ())
    maximum = bitcast_f32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    exp_of_scores((scores,), (scores,), n, (maximum, scale))
    fill_zeros(scores, lo)
    fill_zeros(scores + 4 * hi, n - hi)
    return sum_f32(scores, n, ())


def make_attend(kind: Any) -> Any:
    """Make `attend` for a KV cache with numbers of type `kind`."""
    score_tile, value_tile = make_score_kernel(TILE_ROWS, 2, kind), make_value_kernel(TILE_ROWS, kind)
    score_keys, score_key = make_score_kernel(1, LANES, kind), make_score_kernel(1, 1, kind)
    value_row = make_value_kernel(1, kind)
    n_bytes = 4 if kind == F32 else 2

    @njit
    def attend(m, c, layer_base, layer, b, h, n_queries, ctx):
        """Compute attention for KV head h and the rows b..b+n_queries-1 (1 or TILE_ROWS) of one slot."""
        D, heads_per_kv = m[MODEL.head_dim], m[MODEL.n_head] // m[MODEL.n_kv_head]
        q_width, y_width = m[layer_base + LAYER.q + MATRIX.padded_out], m[layer_base + LAYER.o + MATRIX.in_features]
        scale = np.float32(1 / math.sqrt(D)) if m[MODEL.scale_scores] else np.float32(1)
        position, window = view_i64(c[CALL.positions], c[CALL.n_rows])[b], m[layer_base + LAYER.window]
        # Scores of positions first..last, in scratch from `start` on: which lane of a sum a position belongs to must
        # not depend on the other rows of the tile.
        first, last = max(0, position + 1 - window), position + n_queries - 1
        n_keys, start = last + 1 - first, first // SCORE_CHUNK * SCORE_CHUNK
        n_scores = (last + SCORE_CHUNK - start) // SCORE_CHUNK * SCORE_CHUNK
        scores, first_score = ctx.x, ctx.x + 4 * (first - start)
        offset = kv_offset(m, c, layer, b, h, first, n_bytes)
        keys, values = c[CALL.keys] + offset, c[CALL.values] + offset
        for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
            q, y = c[CALL.q] + 4 * (b * q_width + g * D), c[CALL.attn_out] + 4 * (b * y_width + g * D)
            if n_queries == TILE_ROWS:
                score_tile(q, 4 * q_width, keys, n_keys, first_score, 4 * n_scores, D)
            elif n_keys >= LANES:
                score_keys(q, 4 * q_width, keys, n_keys, first_score, 4 * n_scores, D)
            else:
                score_key(q, 4 * q_width, keys, n_keys, first_score, 4 * n_scores, D)
            totals = view_f32(scores + 4 * n_scores * n_queries, n_queries)
            for i in range(n_queries):
                lo, hi = max(0, position + i + 1 - window) - start, position + i + 1 - start
                totals[i] = softmax(scores + 4 * n_scores * i, n_scores, lo, hi, scale)
            if n_queries == TILE_ROWS:
                value_tile(first_score, 4 * n_scores, values, n_keys, y, 4 * y_width, D)
            else:
                value_row(first_score, 4 * n_scores, values, n_keys, y, 4 * y_width, D)
            for i in range(n_queries):
                row = y + 4 * y_width * i
                divide_f32((row,), (row,), D, (totals[i],))

    return attend


attend_f32, attend_f16 = make_attend(F32), make_attend(I16)


@njit
def count_tile_rows(positions, slots, b, end):
    """Return TILE_ROWS if the rows from b to end - 1 are that many adjacent positions of one slot, otherwise 1."""
    if b + TILE_ROWS > end:
        return 1
    for i in range(1, TILE_ROWS):
        if slots[b + i] != slots[b] or positions[b + i] != positions[b] + i:
            return 1
    return TILE_ROWS


@njit
def attention(m, c, layer_base, layer, ctx):
    """Causal attention: each row attends to the cached keys of its slot up to its own position, within the window.

    Writes softmax(q . k / sqrt(D)) v of every query head to c[CALL.attn_out], (B, n_head D). Tiles of rows times KV
    heads are split among the pieces, so that one thread reads the keys and values for all query heads of a group (GQA).
    """
    n_kv_head, n_rows = m[MODEL.n_kv_head], c[CALL.n_rows]
    positions, slots = view_i64(c[CALL.positions], n_rows), view_i64(c[CALL.slots], n_rows)
    n_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    for item in range(ctx.piece, n_tiles * n_kv_head, ctx.n_pieces):
        b, h = item // n_kv_head * TILE_ROWS, item % n_kv_head
        end = min(b + TILE_ROWS, n_rows)
        while b < end:
            n_queries = count_tile_rows(positions, slots, b, end)
            if c[CALL.kv_is_f16]:
                attend_f16(m, c, layer_base, layer, b, h, n_queries, ctx)
            else:
                attend_f32(m, c, layer_base, layer, b, h, n_queries, ctx)
            b += n_queries
