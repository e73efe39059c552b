"""The forward pass as a list of phases, whose pieces the threads of a call compute."""

from typing import Any

import numba
import numpy as np
from numba import carray, types

from tinystories.engine.cpu.kernels.attention import attention, write_kv
from tinystories.engine.cpu.kernels.elementwise import apply_gelu_erf, apply_gelu_tanh, apply_relu, multiply_by_silu
from tinystories.engine.cpu.kernels.embedding import embed
from tinystories.engine.cpu.kernels.layout import CALL, GELU_ERF, GELU_TANH, LAYER, MATRIX, MODEL, PHASES_PER_LAYER
from tinystories.engine.cpu.kernels.matmul import KERNELS, matmul_add_residual, matmul_rows, opaque_zero, quantize_rows
from tinystories.engine.cpu.kernels.memory import make_context, njit
from tinystories.engine.cpu.kernels.norm import layer_or_rms_norm
from tinystories.engine.cpu.kernels.work_queue import claim_piece, finish_piece

# The phases of a layer. Each reads only what earlier phases have completed.
QKV, WRITE_KV, ATTENTION, ATTENTION_OUT, MLP_UP, MLP_DOWN = range(PHASES_PER_LAYER)


@njit
def norm_and_quantize(m, c, norm, base, ctx):
    """Norm the rows of the residual stream into `ctx.x` and quantize them for the matrix at `base`.

    `norm` is the index in `m` of the address of the norm's weight; that of its bias follows (0 for RMSNorm).
    """
    C = m[MODEL.n_embd]
    for b in range(c[CALL.n_rows]):
        x, y = c[CALL.x] + 4 * C * b, ctx.x + 4 * C * b
        layer_or_rms_norm(x, C, m[norm], m[norm + 1], m[MODEL.modern] == 1, ctx.eps, y)
    quantize_rows(m, c, base, ctx.x, C, ctx)


@njit
def feed_forward(m, c, layer_base, ctx):
    """Compute this piece's columns of the MLP's hidden layer: silu(gate x) * up x (SwiGLU), or relu or gelu(up x).

    Reads x from `ctx.x` and writes to c[CALL.mlp_hidden]. The down projection is the next phase.
    """
    padded_out = m[layer_base + LAYER.up + MATRIX.padded_out]
    lo, hi = matmul_rows(m, c, layer_base + LAYER.up, opaque_zero(m), c[CALL.mlp_hidden], ctx)
    if m[MODEL.modern]:  # `gate` has the shape of `up`, so this piece is the same columns lo:hi of both
        matmul_rows(m, c, layer_base + LAYER.gate, opaque_zero(m), c[CALL.gate], ctx)
    for b in range(c[CALL.n_rows]):
        offset = 4 * (b * padded_out + lo)
        hidden, gate = c[CALL.mlp_hidden] + offset, c[CALL.gate] + offset
        if m[MODEL.modern]:
            multiply_by_silu((hidden,), (hidden, gate), hi - lo, ())
        elif m[MODEL.activation] == GELU_TANH:
            apply_gelu_tanh((hidden,), (hidden,), hi - lo, ())
        elif m[MODEL.activation] == GELU_ERF:
            apply_gelu_erf((hidden,), (hidden,), hi - lo, ())
        else:
            apply_relu((hidden,), (hidden,), hi - lo, ())


@njit
def prepare_rows(m, c, layer_base, step, ctx):
    """Write the input of a phase's matmuls to this thread's scratch. Each thread does so once per phase.

    Norms and quantization are cheap: repeating them on every thread is faster than sharing the results.
    """
    if step == QKV:
        norm_and_quantize(m, c, layer_base + LAYER.input_norm, layer_base + LAYER.q, ctx)
    elif step == ATTENTION_OUT:
        attn_width = m[layer_base + LAYER.o + MATRIX.in_features]
        quantize_rows(m, c, layer_base + LAYER.o, c[CALL.attn_out], attn_width, ctx)
    elif step == MLP_UP:
        norm_and_quantize(m, c, layer_base + LAYER.post_norm, layer_base + LAYER.up, ctx)
    elif step == MLP_DOWN:
        hidden_width = m[layer_base + LAYER.up + MATRIX.padded_out]
        quantize_rows(m, c, layer_base + LAYER.down, c[CALL.mlp_hidden], hidden_width, ctx)


@njit
def run_piece(m, c, phase, is_prepared, ctx):
    """Compute one piece of a phase. `is_prepared`: this thread's scratch already has the rows of this phase."""
    if phase == 0:
        embed(m, c, ctx)
        return
    layer, step = (phase - 1) // PHASES_PER_LAYER, (phase - 1) % PHASES_PER_LAYER
    if layer == m[MODEL.n_layer]:  # final norm and LM head, only for the rows whose logits the caller wants
        if not is_prepared:
            norm_and_quantize(m, c, MODEL.norm, MODEL.lm_head, ctx)
        matmul_rows(m, c, MODEL.lm_head, c[CALL.first_logits_row], c[CALL.logits], ctx)
        return
    layer_base = MODEL.layers + layer * LAYER.size
    if not is_prepared:
        prepare_rows(m, c, layer_base, step, ctx)
    if step == QKV:
        matmul_rows(m, c, layer_base + LAYER.q, opaque_zero(m), c[CALL.q], ctx)
        matmul_rows(m, c, layer_base + LAYER.k, opaque_zero(m), c[CALL.k], ctx)
        matmul_rows(m, c, layer_base + LAYER.v, opaque_zero(m), c[CALL.v], ctx)
    elif step == WRITE_KV:
        write_kv(m, c, layer_base, layer, ctx)
    elif step == ATTENTION:
        attention(m, c, layer_base, layer, ctx)
    elif step == ATTENTION_OUT:
        matmul_add_residual(m, c, layer_base + LAYER.o, ctx)
    elif step == MLP_UP:
        feed_forward(m, c, layer_base, ctx)
    else:
        matmul_add_residual(m, c, layer_base + LAYER.down, ctx)


@njit
def count_phases(m, c):
    """Return the number of phases of a call. The first embeds, the last computes the logits, if any are wanted."""
    return 1 + PHASES_PER_LAYER * m[MODEL.n_layer] + (1 if c[CALL.first_logits_row] < c[CALL.n_rows] else 0)


SIGNATURE = types.void(
    types.CPointer(types.int64),
    types.CPointer(types.int64),
    types.float64,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
)


def make_entry_point(precision: str) -> Any:
    """Compile the forward pass to a C function of (model table, call table, eps, queue, epoch, n_pieces, thread).

    All matrices of the model have this precision, fp32, int8 (with activations of 16 bits, or of 8: int8-a8) or int4;
    the embedding may have another.

    All threads of a call run it with the same arguments except `thread`, and return when the call is complete. A thread
    that comes late, perhaps after the tables have been freed or filled for the next call, finds that the epoch of the
    queue has changed and returns: only the holder of a piece may read the tables, since no call completes without it.
    """

    kernels = KERNELS[precision]

    @numba.cfunc(SIGNATURE, error_model="numpy")
    def tinystories_forward(model, call, eps, queue, epoch, n_pieces, thread):
        prepared_phase = -1
        while True:
            phase, piece = claim_piece(queue, epoch, n_pieces)
            if piece < 0:
                return
            m = carray(model, (MODEL.layers,))  # enough to read n_layer, which gives the length of the whole table
            m = carray(model, (MODEL.layers + m[MODEL.n_layer] * LAYER.size,))
            c = carray(call, (CALL.size,))
            ctx = make_context(c, kernels, np.float32(eps), piece, n_pieces, thread)
            run_piece(m, c, phase, phase == prepared_phase, ctx)
            prepared_phase = phase
            finish_piece(queue, epoch, phase, n_pieces, count_phases(m, c))

    return tinystories_forward
