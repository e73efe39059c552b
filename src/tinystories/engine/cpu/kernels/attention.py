"""Attention: QK-norm and RoPE, the KV cache, and the attention itself."""

import math
from typing import NamedTuple

import numpy as np

from tinystories.engine.cpu.kernels.attention_simd import (
    LANES,
    exp_and_sum,
    make_row_score_kernel,
    make_score_kernel,
    make_value_kernel,
    narrow_to_f16,
    prefetch_to_write,
    widen_f16,
)
from tinystories.engine.cpu.kernels.elementwise import copy_f32, divide_f32, max_ordered_bits, rotate_pairs
from tinystories.engine.cpu.kernels.layout import CALL, KEY_BLOCK, LAYER, MATRIX, MODEL, TILE_ROWS
from tinystories.engine.cpu.kernels.memory import njit, view_f32, view_i16, view_i64
from tinystories.engine.cpu.kernels.norm import layer_or_rms_norm
from tinystories.engine.cpu.kernels.simd import F32, I16, bitcast_f32

score_tile, value_tile = make_score_kernel(TILE_ROWS, F32), make_value_kernel(TILE_ROWS, F32)
score_tile_f32, score_keys_f32, score_key_f32 = (
    make_row_score_kernel(*n) for n in ((TILE_ROWS, 2), (1, LANES), (1, 1))
)
value_row_f32 = make_value_kernel(1, F32)
score_row, value_row = make_score_kernel(1, I16), make_value_kernel(1, I16)


@njit
def kv_offset(m, c, layer, b, h, position):
    """Return the offset in bytes of a position in the values of KV head h, in the slot of row b.

    It is that of the keys too, except for fp16 keys of a position that is not the first one of a block.
    """
    slot = view_i64(c[CALL.slots], c[CALL.n_rows])[b]
    head_index = (layer * c[CALL.n_slots] + slot) * m[MODEL.n_kv_head] + h
    if c[CALL.kv_is_f16]:
        n_positions = (m[MODEL.n_ctx] + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK
        return 2 * m[MODEL.head_dim] * (head_index * n_positions + position)
    return 4 * m[MODEL.head_dim] * (head_index * m[MODEL.n_ctx] + position)


@njit
def norm_heads(m, x, first, last, norm_weight, ctx):
    """Apply QK-norm to heads first..last-1 of a row of q or k at the address x, in place."""
    D = m[MODEL.head_dim]
    for h in range(first, last):
        head = x + 4 * D * h
        layer_or_rms_norm(head, D, norm_weight, norm_weight, True, ctx.eps, head)


@njit
def rotate_heads(m, x, first, last, position):
    """Apply RoPE to heads first..last-1 of a row of q or k at the address x, in place."""
    D = m[MODEL.head_dim]
    half = D // 2  # dimension d is paired with d + D/2
    row = 4 * half * position  # the tables are (S, D/2), see `position_tables.build_rope_tables`
    for h in range(first, last):
        pair = (x + 4 * D * h, x + 4 * (D * h + half))
        rotate_pairs(pair, (*pair, m[MODEL.rope_cos] + row, m[MODEL.rope_sin] + row), half, ())


@njit
def write_heads(m, c, layer_base, layer, b, first, last, ctx):
    """Do the work of `write_kv` for KV heads first..last-1 of row b.

    Each step for all heads at a time: the steps of a head wait for the results of the previous one.
    """
    D, heads_per_kv = m[MODEL.head_dim], m[MODEL.n_head] // m[MODEL.n_kv_head]
    position, k_width = view_i64(c[CALL.positions], c[CALL.n_rows])[b], m[layer_base + LAYER.k + MATRIX.padded_out]
    q, k = c[CALL.q] + 4 * b * m[layer_base + LAYER.q + MATRIX.padded_out], c[CALL.k] + 4 * b * k_width
    block, lane = position // KEY_BLOCK * KEY_BLOCK, position % KEY_BLOCK
    if c[CALL.kv_is_f16]:  # a key is written to as many cache lines as a block has
        for h in range(first, last):
            prefetch_to_write(c[CALL.keys] + kv_offset(m, c, layer, b, h, block), 2 * KEY_BLOCK * D)
    if m[MODEL.modern]:  # classic models have neither QK-norm nor RoPE
        if m[layer_base + LAYER.q_norm]:
            norm_heads(m, q, first * heads_per_kv, last * heads_per_kv, m[layer_base + LAYER.q_norm], ctx)
            norm_heads(m, k, first, last, m[layer_base + LAYER.k_norm], ctx)
        rotate_heads(m, q, first * heads_per_kv, last * heads_per_kv, position)
        rotate_heads(m, k, first, last, position)
    for h in range(first, last):
        offset = kv_offset(m, c, layer, b, h, position)
        key, value = k + 4 * D * h, c[CALL.v] + 4 * (b * k_width + D * h)
        if c[CALL.kv_is_f16]:
            narrow_to_f16(key, ctx.x, D)
            narrow_to_f16(value, c[CALL.values] + offset, D)
            keys = c[CALL.keys] + kv_offset(m, c, layer, b, h, block)
            source, target = view_i16(ctx.x, D), view_i16(keys, KEY_BLOCK * D)
            for d in range(D):
                target[KEY_BLOCK * d + lane] = source[d]
        else:
            copy_f32((c[CALL.keys] + offset,), (key,), D, ())
            copy_f32((c[CALL.values] + offset,), (value,), D, ())


@njit
def write_kv(m, c, layer_base, layer, ctx):
    """Apply QK-norm and RoPE to q and k, and write the keys and values of all new tokens to the KV cache.

    The (row, KV head) pairs are split among the pieces, adjacent rows together, since a block holds keys of several.
    A pair includes the query heads that use this KV head.
    """
    n_kv_head = m[MODEL.n_kv_head]
    n_items = c[CALL.n_rows] * n_kv_head
    item, end = n_items * ctx.piece // ctx.n_pieces, n_items * (ctx.piece + 1) // ctx.n_pieces
    while item < end:
        b, first = item // n_kv_head, item % n_kv_head
        last = min(n_kv_head, end - b * n_kv_head)
        write_heads(m, c, layer_base, layer, b, first, last, ctx)
        item += last - first


@njit
def softmax(scores, n_blocks, lo, hi, scale):
    """Replace scores (fp32, at an address) by e^(scale (score - maximum)), and those outside lo..hi-1 by 0.

    Returns the sum; the caller divides by it. Scores outside lo..hi-1 may be anything.
    """
    bits = max_ordered_bits(scores + 4 * lo, hi - lo, ())
    maximum = bitcast_f32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return exp_and_sum(scores, n_blocks, lo, hi, maximum, scale)


class Span(NamedTuple):
    """The positions that a tile of rows attends to, first..last, as addresses of what one KV head has for them."""

    first: int
    last: int
    keys: int  # of the block with `first`; in fp32 of `first`
    values: int  # of `first`
    next_keys: int  # what is read after this; a single row prefetches it


@njit
def attend(m, c, layer_base, b, h, n_queries, span, ctx):
    """Compute attention for KV head h and the rows b..b+n_queries-1 (1 or TILE_ROWS) of one slot.

    A single row reads the KV cache, and prefetches its fp16 values while it reads keys; a tile of rows reads fp32.
    """
    D, heads_per_kv = m[MODEL.head_dim], m[MODEL.n_head] // m[MODEL.n_kv_head]
    q_width, y_width = 4 * m[layer_base + LAYER.q + MATRIX.padded_out], 4 * m[layer_base + LAYER.o + MATRIX.in_features]
    scale = np.float32(1 / math.sqrt(D)) if m[MODEL.scale_scores] else np.float32(1)
    position, window = view_i64(c[CALL.positions], c[CALL.n_rows])[b], m[layer_base + LAYER.window]
    # Scores of whole blocks: which lane of a sum a position belongs to must not depend on the other rows of the tile.
    start = span.first // KEY_BLOCK * KEY_BLOCK
    n_keys, n_blocks = span.last + 1 - span.first, (span.last - start) // KEY_BLOCK + 1
    row_bytes = 4 * KEY_BLOCK * n_blocks
    scores, weights = ctx.x, ctx.x + 4 * (span.first - start)
    totals = view_f32(scores + row_bytes * n_queries, n_queries)
    for g in range(h * heads_per_kv, (h + 1) * heads_per_kv):
        q, y = c[CALL.q] + b * q_width + 4 * D * g, c[CALL.attn_out] + b * y_width + 4 * D * g
        if c[CALL.kv_is_f16] and n_queries == TILE_ROWS:
            score_tile(q, q_width, span.keys, n_blocks, scores, row_bytes, D, 0)
        elif c[CALL.kv_is_f16]:
            score_row(q, q_width, span.keys, n_blocks, scores, row_bytes, D, span.values - span.keys)
        elif n_queries == TILE_ROWS:
            score_tile_f32(q, q_width, span.keys, n_keys, weights, row_bytes, D)
        elif n_keys >= LANES:
            score_keys_f32(q, q_width, span.keys, n_keys, weights, row_bytes, D)
        else:
            score_key_f32(q, q_width, span.keys, n_keys, weights, row_bytes, D)
        for i in range(n_queries):
            lo, hi = max(0, position + i + 1 - window) - start, position + i + 1 - start
            totals[i] = softmax(scores + row_bytes * i, n_blocks, lo, hi, scale)
        if n_queries == TILE_ROWS:
            value_tile(weights, row_bytes, span.values, n_keys, y, y_width, D, 0)
        elif c[CALL.kv_is_f16]:
            value_row(weights, row_bytes, span.values, n_keys, y, y_width, D, span.next_keys - span.values)
        else:
            value_row_f32(weights, row_bytes, span.values, n_keys, y, y_width, D, span.next_keys - span.values)
        for i in range(n_queries):
            row = y + y_width * i
            divide_f32((row,), (row,), D, (totals[i],))


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
    Tiles of the same head are adjacent: the fp16 keys and values of a slot are widened to fp32 once for all of them.
    """
    D, n_kv_head, n_rows, window = m[MODEL.head_dim], m[MODEL.n_kv_head], c[CALL.n_rows], m[layer_base + LAYER.window]
    positions, slots = view_i64(c[CALL.positions], n_rows), view_i64(c[CALL.slots], n_rows)
    n_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    wide_values = ctx.wide_kv + 4 * D * ((m[MODEL.n_ctx] + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK)
    wide_slot, wide_head, wide_start, wide_end = -1, -1, 0, 0  # which positions have been widened
    n_items = n_tiles * n_kv_head
    item, end_item = n_items * ctx.piece // ctx.n_pieces, n_items * (ctx.piece + 1) // ctx.n_pieces
    b = item % n_tiles * TILE_ROWS
    while item < end_item:
        h, end = item // n_tiles, min(n_rows, (item % n_tiles + 1) * TILE_ROWS)
        n_queries = count_tile_rows(positions, slots, b, end)
        first, last = max(0, positions[b] + 1 - window), positions[b] + n_queries - 1
        start = first // KEY_BLOCK * KEY_BLOCK
        offset = kv_offset(m, c, layer, b, h, first)
        keys, values = c[CALL.keys] + offset, c[CALL.values] + offset
        if c[CALL.kv_is_f16]:
            keys -= 2 * D * (first - start)
        if n_queries == TILE_ROWS and c[CALL.kv_is_f16]:
            if slots[b] != wide_slot or h != wide_head or not wide_start <= start <= wide_end:
                wide_slot, wide_head, wide_start, wide_end = slots[b], h, start, start
            n_new = max(0, last // KEY_BLOCK * KEY_BLOCK + KEY_BLOCK - wide_end)
            source, target = 2 * D * (wide_end - start), 4 * D * (wide_end - wide_start)
            widen_f16(keys + source, ctx.wide_kv + target, D * n_new)
            widen_f16(values - 2 * D * (first - start) + source, wide_values + target, D * n_new)
            wide_end += n_new
            keys, values = ctx.wide_kv + 4 * D * (start - wide_start), wide_values + 4 * D * (first - wide_start)
        next_b = b + n_queries
        item += next_b >= end
        next_b = next_b if next_b < n_rows else 0
        next_first = max(0, positions[next_b] + 1 - window) // KEY_BLOCK * KEY_BLOCK
        next_head = min(item // n_tiles, n_kv_head - 1)
        next_keys = c[CALL.keys] + kv_offset(m, c, layer, next_b, next_head, next_first)
        attend(m, c, layer_base, b, h, n_queries, Span(first, last, keys, values, next_keys), ctx)
        b = next_b
