"""Numba kernels for training on a CPU: what PyTorch computes in many passes over memory, in one or two.

Arrays are fp32, or bf16 as the 16-bit integers that hold its bits (NumPy has no bf16); kernels compute in fp32 and
round once, to the nearest. Each kernel takes `first` and `last` and processes these of the `N_PARTS` parts of its rows,
so that threads share its work. What it sums over rows it sums for each part, so the number of threads does not change
the result.

Letters in shapes: N rows, C or F columns, H heads, D = head_dim, T tokens, L keys that a block of queries may see.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

N_PARTS = 32
MIN_NUMBERS_PER_THREAD = 2**19  # for fewer, waking another thread costs more than it saves (docs/log.md)
# With `reassoc` LLVM may vectorize sums; NaN and infinity keep their meaning.
njit = numba.njit(error_model="numpy", fastmath={"reassoc", "contract", "nsz"}, nogil=True, cache=True)
njit_exact = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True, cache=True)

f32 = np.float32
F32, I32, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
ZERO, ONE = f32(0), f32(1)
LOG2_E = f32(math.log2(math.e))
ROUNDING = f32(1.5 * 2**23)  # adding it to a smaller number rounds that to an integer, which the low bits then hold
# 2^r for -0.5 <= r <= 0.5 (Cephes' exp2f), the highest power first; the relative error is below 1e-7.
EXP2 = tuple(
    f32(c) for c in (1.535336188e-4, 1.339887440e-3, 9.618437357e-3, 5.550332472e-2, 2.402264791e-1, 6.931472029e-1)
)
LANES = 16  # rows of scores are processed in multiples of it, without a remainder


def as_array(tensor: Tensor) -> Any:
    """Return a NumPy view of an fp32 or bf16 tensor; bf16 becomes uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Run a kernel on at most as many threads as PyTorch uses. Tensors among the arguments become arrays."""
    n_numbers = max(value.numel() for value in arguments if isinstance(value, Tensor))
    arguments = tuple(as_array(value) if isinstance(value, Tensor) else value for value in arguments)
    n_threads = max(1, min(torch.get_num_threads(), N_PARTS, n_numbers // MIN_NUMBERS_PER_THREAD))
    bounds = [N_PARTS * i // n_threads for i in range(n_threads + 1)]
    others = [thread_pool(n_threads - 1).submit(kernel, *arguments, *bounds[i : i + 2]) for i in range(1, n_threads)]
    kernel(*arguments, *bounds[:2])
    for other in others:
        other.result()


def run_each(kernel: Callable[..., None], calls: Sequence[Sequence[Any]]) -> None:
    """Call a kernel, which need not know of parts, with each of these lists of arguments, on several threads."""

    def call(arguments: Sequence[Any]) -> None:
        kernel(*(as_array(value) if isinstance(value, Tensor) else value for value in arguments))

    n_threads = min(torch.get_num_threads(), len(calls))
    for _ in thread_pool(n_threads).map(call, calls) if n_threads > 1 else map(call, calls):
        pass


@functools.cache
def thread_pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="training-kernel")


@intrinsic
def widen(context, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return a number of an array as fp32."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return args[0] if x == types.float32 else b.bitcast(b.shl(b.zext(args[0], I32), I32(16)), F32)

    assert x in (types.float32, types.uint16), x
    return types.float32(x), codegen


@intrinsic
def narrow(context, x, array):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return an fp32 number as the array stores it: bf16 is rounded to nearest, ties to even."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        if array.dtype == types.float32:
            return args[0]
        bits = b.bitcast(args[0], I32)
        is_odd = b.and_(b.lshr(bits, I32(16)), I32(1))
        return b.trunc(b.lshr(b.add(bits, b.add(is_odd, I32(0x7FFF))), I32(16)), I16)

    assert array.dtype in (types.float32, types.uint16), array
    return array.dtype(types.float32, array), codegen


@intrinsic
def power_of_two(context, rounded):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return 2^n from n + ROUNDING."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return b.bitcast(b.shl(b.add(b.bitcast(args[0], I32), I32(127)), I32(23)), F32)

    return types.float32(types.float32), codegen


@intrinsic
def order_key(context, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return an integer for fp32 that is ordered like the numbers, since LLVM vectorizes no maximum of floats."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return flip_negative(b, b.bitcast(args[0], I32))

    return types.int32(types.float32), codegen


@intrinsic
def from_order_key(context, key):  # type: ignore[no-untyped-def]  # noqa: ARG001
    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return b.bitcast(flip_negative(b, args[0]), F32)

    return types.float32(types.int32), codegen


def flip_negative(b: Any, bits: Any) -> Any:
    """Invert all but the sign of negative integers."""
    return b.xor(bits, b.and_(b.ashr(bits, I32(31)), I32(0x7FFFFFFF)))


@njit_exact
def exp2(x):  # type: ignore[no-untyped-def]
    """Return 2^x, limited to 2^-126 and 2^126."""
    x = min(max(x, f32(-126)), f32(126))
    rounded = x + ROUNDING
    r = x - (rounded - ROUNDING)
    p = EXP2[0]
    p = p * r + EXP2[1]
    p = p * r + EXP2[2]
    p = p * r + EXP2[3]
    p = p * r + EXP2[4]
    p = p * r + EXP2[5]
    return (p * r + ONE) * power_of_two(rounded)


@njit
def maximum(x, n):  # type: ignore[no-untyped-def]
    """Return the largest of the first n numbers of x; NaN counts as the largest."""
    largest = np.int32(-(2**31))
    for i in range(n):
        key = order_key(widen(x[i]))
        largest = key if key > largest else largest
    return from_order_key(largest)


@njit
def rms_norm(x, weight, eps, y, inv_rms, first, last):  # type: ignore[no-untyped-def]
    """Write RMSNorm of x (N, C) to y and 1 / rms to inv_rms (N)."""
    n_rows, n_columns = x.shape
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        x_row, y_row = x[n], y[n]
        squares = ZERO
        for i in range(n_columns):
            squares += widen(x_row[i]) * widen(x_row[i])
        scale = ONE / math.sqrt(squares / f32(n_columns) + eps)
        inv_rms[n] = scale
        for i in range(n_columns):
            y_row[i] = narrow(widen(x_row[i]) * scale * weight[i], y)


@njit
def rms_norm_backward(grad, x, weight, inv_rms, grad_x, grad_weight, first, last):  # type: ignore[no-untyped-def]
    """Write the gradient of x, and add that of the weight to row p of grad_weight (N_PARTS, C) for each part p."""
    n_rows, n_columns = x.shape
    for part in range(first, last):
        part_weight = grad_weight[part]
        for n in range(n_rows * part // N_PARTS, n_rows * (part + 1) // N_PARTS):
            row, x_row, grad_row, scale = grad[n], x[n], grad_x[n], inv_rms[n]
            along_x = ZERO
            for i in range(n_columns):
                grad_normed = widen(row[i]) * widen(x_row[i]) * scale
                part_weight[i] += grad_normed
                along_x += grad_normed * weight[i]
            along_x *= -scale * scale / f32(n_columns)
            for i in range(n_columns):
                grad_row[i] = narrow(widen(row[i]) * weight[i] * scale + widen(x_row[i]) * along_x, grad_x)


@njit
def split_heads(qkv, q_weight, k_weight, eps, cos, sin, q, k, v, inv_rms, first, last):  # type: ignore[no-untyped-def]
    """Write queries and keys, normed and rotated, and values from qkv (B, T, 3, H, D) to q, k, v (B, H, T, D).

    cos and sin (T, D) are those of `apply_rope`; inv_rms (B, T, 2, H) is for the backward pass.
    """
    n_batch, n_tokens, _, n_heads, size = qkv.shape
    n_rows, half = n_batch * n_tokens, size // 2
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        b, t = n // n_tokens, n % n_tokens
        cos_row, sin_row = cos[t], sin[t]
        for h in range(2 * n_heads):
            which, head = h // n_heads, h % n_heads
            x = qkv[b, t, which, head]
            weight, y = (q_weight, q[b, head, t]) if which == 0 else (k_weight, k[b, head, t])
            squares = ZERO
            for i in range(size):
                squares += widen(x[i]) * widen(x[i])
            scale = ONE / math.sqrt(squares / f32(size) + eps)
            inv_rms[b, t, which, head] = scale
            for i in range(half):
                low, high = widen(x[i]) * scale * weight[i], widen(x[i + half]) * scale * weight[i + half]
                y[i] = narrow(low * cos_row[i] + high * sin_row[i], q)
                y[i + half] = narrow(high * cos_row[i + half] + low * sin_row[i + half], q)
        for head in range(n_heads):
            x, y = qkv[b, t, 2, head], v[b, head, t]
            for i in range(size):
                y[i] = x[i]


@njit
def split_heads_backward(  # type: ignore[no-untyped-def]
    grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, inv_rms, grad_qkv, grad_weight, first, last
):
    """Write the gradient of qkv, and add those of the weights to row p of grad_weight (N_PARTS, 2, D) for part p."""
    n_batch, n_tokens, _, n_heads, size = qkv.shape
    n_rows, half = n_batch * n_tokens, size // 2
    grad_y = np.empty(size, np.float32)
    for part in range(first, last):
        for n in range(n_rows * part // N_PARTS, n_rows * (part + 1) // N_PARTS):
            b, t = n // n_tokens, n % n_tokens
            cos_row, sin_row = cos[t], sin[t]
            for h in range(2 * n_heads):
                which, head = h // n_heads, h % n_heads
                x, y, part_weight = qkv[b, t, which, head], grad_qkv[b, t, which, head], grad_weight[part, which]
                weight, grad = (q_weight, grad_q[b, head, t]) if which == 0 else (k_weight, grad_k[b, head, t])
                scale = inv_rms[b, t, which, head]
                for i in range(half):
                    low, high = widen(grad[i]), widen(grad[i + half])
                    grad_y[i] = low * cos_row[i] + high * sin_row[i + half]
                    grad_y[i + half] = high * cos_row[i + half] + low * sin_row[i]
                along_x = ZERO
                for i in range(size):
                    grad_normed = grad_y[i] * widen(x[i]) * scale
                    part_weight[i] += grad_normed
                    along_x += grad_normed * weight[i]
                along_x *= -scale * scale / f32(size)
                for i in range(size):
                    y[i] = narrow(grad_y[i] * weight[i] * scale + widen(x[i]) * along_x, qkv)
            for head in range(n_heads):
                grad, y = grad_v[b, head, t], grad_qkv[b, t, 2, head]
                for i in range(size):
                    y[i] = grad[i]


@njit
def causal_softmax(scores, scale, n_earlier, first, last):  # type: ignore[no-untyped-def]
    """Turn scores (H, T, L) into softmax(scale * scores) in place; query t sees the first n_earlier + t + 1 keys."""
    n_heads, n_queries, n_keys = scores.shape
    n_rows, scale = n_heads * n_queries, scale * LOG2_E
    p = np.empty(n_keys, np.float32)
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        row, n_seen = scores[n // n_queries, n % n_queries], n_earlier + n % n_queries + 1
        n_computed = min(n_keys, (n_seen + LANES - 1) // LANES * LANES)
        largest = maximum(row, n_seen) * scale
        for i in range(n_computed):
            p[i] = exp2(widen(row[i]) * scale - largest)
        p[n_seen:n_computed] = ZERO
        total = ZERO
        for i in range(n_computed):
            total += p[i]
        inverse = ONE / total
        for i in range(n_computed):
            row[i] = narrow(p[i] * inverse, scores)
        row[n_computed:] = 0


@njit
def causal_softmax_backward(p, grad, scale, n_earlier, first, last):  # type: ignore[no-untyped-def]
    """Turn the gradient of the probabilities p (H, T, L) into that of the scores of `causal_softmax`, in place."""
    n_heads, n_queries, n_keys = p.shape
    n_rows = n_heads * n_queries
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        p_row, grad_row = p[n // n_queries, n % n_queries], grad[n // n_queries, n % n_queries]
        n_computed = min(n_keys, (n_earlier + n % n_queries + LANES) // LANES * LANES)
        dot = ZERO
        for i in range(n_computed):
            dot += widen(p_row[i]) * widen(grad_row[i])
        for i in range(n_computed):
            grad_row[i] = narrow(widen(p_row[i]) * (widen(grad_row[i]) - dot) * scale, grad)
        grad_row[n_computed:] = 0


@njit
def gated_silu(gate, up, y, first, last):  # type: ignore[no-untyped-def]
    """Write silu(gate) * up to y; all are (N, F)."""
    n_rows, n_columns = gate.shape
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        gate_row, up_row, y_row = gate[n], up[n], y[n]
        for i in range(n_columns):
            x = widen(gate_row[i])
            y_row[i] = narrow(x * widen(up_row[i]) / (ONE + exp2(-LOG2_E * x)), y)


@njit
def gated_silu_backward(grad, gate, up, grad_gate, grad_up, first, last):  # type: ignore[no-untyped-def]
    """Write the gradients of gate and up; all are (N, F)."""
    n_rows, n_columns = gate.shape
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        row, gate_row, up_row = grad[n], gate[n], up[n]
        grad_gate_row, grad_up_row = grad_gate[n], grad_up[n]
        for i in range(n_columns):
            x, grad_y = widen(gate_row[i]), widen(row[i])
            sigmoid = ONE / (ONE + exp2(-LOG2_E * x))
            silu = x * sigmoid
            grad_up_row[i] = narrow(silu * grad_y, grad_up)
            grad_gate_row[i] = narrow(grad_y * widen(up_row[i]) * (sigmoid + silu * (ONE - sigmoid)), grad_gate)
