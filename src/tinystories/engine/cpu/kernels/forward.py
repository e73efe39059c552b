"""The forward pass: one call per thread computes all layers and the logits."""

from typing import Any

import numba
import numpy as np
from numba import carray, types

from tinystories.engine.cpu.kernels.attention import attention, write_kv
from tinystories.engine.cpu.kernels.layout import CALL, GELU_ERF, GELU_TANH, LAYER, MATRIX, MODEL
from tinystories.engine.cpu.kernels.matmul import matmul_add_residual, matmul_rows, opaque_zero, quantize_rows
from tinystories.engine.cpu.kernels.memory import FASTMATH, make_context, njit, view_f32
from tinystories.engine.cpu.kernels.scalar_math import exp, gelu_erf, gelu_tanh, layer_or_rms_norm
from tinystories.engine.cpu.kernels.simd import barrier_wait


@njit
def norm_and_quantize(m, c, norm, base, ctx):
    """Norm the rows of the residual stream into `ctx.x` and quantize them for the matrix at `base`.

    `norm` is the index in `m` of the address of the norm's weight; that of its bias follows (0 for RMSNorm).
    """
    n_rows, C = c[CALL.n_rows], m[MODEL.n_embd]
    x, y, weight = view_f32(c[CALL.x], n_rows * C), view_f32(ctx.x, n_rows * C), view_f32(m[norm], C)
    bias = view_f32(m[norm + 1], C) if m[norm + 1] else weight  # RMSNorm ignores it
    for b in range(n_rows):
        row = slice(b * C, (b + 1) * C)
        layer_or_rms_norm(x[row], weight, bias, m[MODEL.modern] == 1, ctx.eps, y[row])
    quantize_rows(m, c, base, ctx)


@njit
def feed_forward(m, c, layer_base, ctx):
    """Compute this thread's columns of the MLP's hidden layer: silu(gate x) * up x (SwiGLU), or relu or gelu(up x).

    Reads x from `ctx.x` and writes to c[CALL.mlp_hidden]. The down projection follows after a barrier.
    """
    n_rows, padded_out = c[CALL.n_rows], m[layer_base + LAYER.up + MATRIX.padded_out]
    lo, hi = matmul_rows(m, c, layer_base + LAYER.up, opaque_zero(m), c[CALL.mlp_hidden], ctx)
    hidden = view_f32(c[CALL.mlp_hidden], n_rows * padded_out)
    gate = view_f32(c[CALL.gate], n_rows * padded_out)
    if m[MODEL.modern]:  # `gate` has the shape of `up`, so this thread computes the same columns lo:hi of both
        matmul_rows(m, c, layer_base + LAYER.gate, opaque_zero(m), c[CALL.gate], ctx)
    for b in range(n_rows):
        columns = range(b * padded_out + lo, b * padded_out + hi)
        if m[MODEL.modern]:
            for i in columns:
                hidden[i] *= gate[i] / (np.float32(1) + exp(-gate[i]))
        elif m[MODEL.activation] == GELU_TANH:
            for i in columns:
                hidden[i] = gelu_tanh(hidden[i])
        elif m[MODEL.activation] == GELU_ERF:
            for i in columns:
                hidden[i] = gelu_erf(hidden[i])
        else:
            for i in columns:
                hidden[i] = max(hidden[i], np.float32(0))


@njit
def forward(m, c, eps, thread, n_threads):
    """Run the forward pass of one call. All threads call it at the same time with the same tables.

    Six barriers per layer separate the writes of a shared buffer from its reads by other threads, and one at the end
    makes the logits complete. The barrier counter never goes back: the k-th barrier of a call waits until it reaches
    barrier_start + k * n_threads.
    """
    ctx = make_context(c, eps, thread, n_threads)
    counter, barrier_start = c[CALL.barrier_counter], c[CALL.barrier_start]
    for layer in range(m[MODEL.n_layer]):
        layer_base = MODEL.layers + layer * LAYER.size
        norm_and_quantize(m, c, layer_base + LAYER.input_norm, layer_base + LAYER.q, ctx)
        matmul_rows(m, c, layer_base + LAYER.q, opaque_zero(m), c[CALL.q], ctx)
        matmul_rows(m, c, layer_base + LAYER.k, opaque_zero(m), c[CALL.k], ctx)
        matmul_rows(m, c, layer_base + LAYER.v, opaque_zero(m), c[CALL.v], ctx)
        barrier_wait(counter, barrier_start + n_threads)  # q, k, v are complete
        write_kv(m, c, layer_base, layer, ctx)
        barrier_wait(counter, barrier_start + 2 * n_threads)  # q is rotated, the KV cache is up to date
        attention(m, c, layer_base, layer, ctx)
        barrier_wait(counter, barrier_start + 3 * n_threads)  # attn_out is complete
        attn_width = m[layer_base + LAYER.o + MATRIX.in_features]
        matmul_add_residual(m, c, layer_base + LAYER.o, c[CALL.attn_out], attn_width, ctx)
        barrier_wait(counter, barrier_start + 4 * n_threads)  # x is complete: residual stream after attention
        norm_and_quantize(m, c, layer_base + LAYER.post_norm, layer_base + LAYER.up, ctx)
        feed_forward(m, c, layer_base, ctx)
        barrier_wait(counter, barrier_start + 5 * n_threads)  # mlp_hidden is complete
        hidden_width = m[layer_base + LAYER.up + MATRIX.padded_out]
        matmul_add_residual(m, c, layer_base + LAYER.down, c[CALL.mlp_hidden], hidden_width, ctx)
        barrier_wait(counter, barrier_start + 6 * n_threads)  # x is complete: residual stream after the MLP
        barrier_start += 6 * n_threads
    # Final norm and LM head, only for the rows whose logits the caller wants.
    if c[CALL.first_logits_row] < c[CALL.n_rows]:
        norm_and_quantize(m, c, MODEL.norm, MODEL.lm_head, ctx)
        matmul_rows(m, c, MODEL.lm_head, c[CALL.first_logits_row], c[CALL.logits], ctx)
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
