"""Numba kernels of the losses for training on a CPU: logits turn into their gradients, in a cache, row by row.

They follow the rules of training_kernels.py. Letters in shapes: N rows, V vocab, K teachers.
"""

import math

import numpy as np
from numba import types
from numba.extending import intrinsic

from tinystories.training_kernels import (
    F32,
    I32,
    LOG2_E,
    N_PARTS,
    ONE,
    ZERO,
    exp2,
    f32,
    maximum,
    narrow,
    njit,
    njit_exact,
    widen,
)

# (log(1 + x) - x + x^2 / 2) / x^3 for 0.7 <= 1 + x <= 1.42 (Cephes' logf), the highest power first.
LOG = tuple(
    f32(c)
    for c in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)  # fmt: skip
LN_2, HALF = f32(math.log(2)), f32(0.5)
BITS_OF_SQRT_HALF = 0x3F3504F3


@intrinsic
def exponent(context, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return the integer n, as fp32, with which x / 2^n is between sqrt(1/2) and sqrt(2); x is positive."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        return b.sitofp(b.ashr(b.sub(b.bitcast(args[0], I32), I32(BITS_OF_SQRT_HALF)), I32(23)), F32)

    return types.float32(types.float32), codegen


@intrinsic
def mantissa(context, x):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return x / 2^exponent(x)."""

    def codegen(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
        bits = b.bitcast(args[0], I32)
        power = b.and_(b.sub(bits, I32(BITS_OF_SQRT_HALF)), I32(-(2**23)))
        return b.bitcast(b.sub(bits, power), F32)

    return types.float32(types.float32), codegen


@njit_exact
def log(x):  # type: ignore[no-untyped-def]
    """Return the natural logarithm of x > 0, and a finite number for 0."""
    n = exponent(x)
    x = mantissa(x) - ONE
    p = LOG[0]
    p = p * x + LOG[1]
    p = p * x + LOG[2]
    p = p * x + LOG[3]
    p = p * x + LOG[4]
    p = p * x + LOG[5]
    p = p * x + LOG[6]
    p = p * x + LOG[7]
    p = p * x + LOG[8]
    square = x * x
    return x + (p * x * square - HALF * square) + n * LN_2


@njit
def exponentials(x, temperature, y):  # type: ignore[no-untyped-def]
    """Set y to exp((x - largest) / temperature); return the sum of y, and the largest number of x."""
    largest, scale = maximum(x, len(y)), LOG2_E / temperature
    for i in range(len(y)):
        y[i] = exp2((widen(x[i]) - largest) * scale)
    total = ZERO
    for i in range(len(y)):
        total += y[i]
    return total, largest


@njit
def cross_entropy(logits, targets, losses, first, last):  # type: ignore[no-untyped-def]
    """Turn logits (N, V) into the gradient of their summed cross-entropy in place, which is written to losses (N).

    Rows with a negative target do not count.
    """
    n_rows, vocab_size = logits.shape
    p = np.empty(vocab_size, np.float32)
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        row, target = logits[n], targets[n]
        if target < 0:
            losses[n] = ZERO
            row[:] = 0
            continue
        total, largest = exponentials(row, ONE, p)
        losses[n] = f32(math.log(total)) + largest - widen(row[target])
        inverse = ONE / total
        p[target] -= total
        for i in range(vocab_size):
            row[i] = narrow(p[i] * inverse, logits)


@njit
def distillation(logits, teacher_logits, targets, kl_weight, temperature, losses, divergences, first, last):  # type: ignore[no-untyped-def]
    """Turn logits (N, V) into the gradient of their `DistillationLoss` in place.

    teacher_logits (K, N, V) are those of K teachers. The cross-entropies are written to losses (N), the divergences to
    divergences (N). Rows with a negative target do not count.
    """
    n_teachers, n_rows, vocab_size = teacher_logits.shape
    temperature, weight = f32(temperature), f32(kl_weight * temperature)
    p = np.empty(vocab_size, np.float32)
    softened_p, teacher_p = np.empty_like(p), np.empty_like(p)
    for n in range(n_rows * first // N_PARTS, n_rows * last // N_PARTS):
        row, target = logits[n], targets[n]
        if target < 0:
            losses[n] = divergences[n] = ZERO
            row[:] = 0
            continue
        teacher_p[:] = ZERO
        for k in range(n_teachers):
            total, _ = exponentials(teacher_logits[k, n], temperature, p)
            share = ONE / (total * f32(n_teachers))
            for i in range(vocab_size):
                teacher_p[i] += p[i] * share

        softened_total, largest = exponentials(row, temperature, softened_p)
        divergence, inverse = f32(math.log(softened_total)), ONE / temperature
        for i in range(vocab_size):
            divergence += teacher_p[i] * (log(teacher_p[i]) - (widen(row[i]) - largest) * inverse)
        divergences[n] = divergence

        total, largest = exponentials(row, ONE, p)
        losses[n] = f32(math.log(total)) + largest - widen(row[target])
        p[target] -= total
        inverse, softened_inverse = ONE / total, ONE / softened_total
        for i in range(vocab_size):
            # The gradient of temperature^2 * KL by the logits is temperature * (softened p - teacher p).
            grad = p[i] * inverse + weight * (softened_p[i] * softened_inverse - teacher_p[i])
            row[i] = narrow(grad, logits)
