"""Elementary functions of the kernels: exp, GELU, LayerNorm and RMSNorm."""

import math

import numpy as np

from tinystories.engine.cpu.kernels.memory import njit
from tinystories.engine.cpu.kernels.simd import bitcast_f32


@njit
def exp(x):
    """Return e^x with a relative error below 2e-7; x is clamped to [-87.3, 88].

    The polynomial of Cephes' expf. It has no branches, so LLVM can vectorize it.
    """
    x = min(max(x, np.float32(-87.3)), np.float32(88))
    # e^x = 2^n e^r with n = round(x / ln 2). ln 2 is subtracted in two parts, so that r keeps its low bits.
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    # Build 2^n from its bits: a biased exponent and an empty mantissa.
    return y * bitcast_f32((np.int32(n) + np.int32(127)) << np.int32(23))


@njit
def gelu_tanh(x):
    """Tanh approximation of GELU (Hendrycks and Gimpel 2016), as in GPT-2.

    x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    return x / (np.float32(1) + exp(x * (np.float32(-1.5957691216) + np.float32(-0.0713548163) * x * x)))


@njit
def gelu_erf(x):
    """Exact GELU, x (1 + erf(x / sqrt(2))) / 2, with an error below 1e-7 |x|.

    Abramowitz and Stegun, formula 7.1.26.
    """
    t = np.float32(1) / (np.float32(1) + np.float32(0.23164189) * abs(x))
    y = np.float32(1.061405429)
    y = y * t + np.float32(-1.453152027)
    y = y * t + np.float32(1.421413741)
    y = y * t + np.float32(-0.284496736)
    y = y * t + np.float32(0.254829592)
    tail = np.float32(0.5) * y * t * exp(np.float32(-0.5) * x * x)
    return x * (np.float32(1) - tail if x > np.float32(0) else tail)


@njit
def layer_or_rms_norm(x, weight, bias, modern, eps, y):
    """Write the RMSNorm (`modern`, which ignores `bias`) or LayerNorm (otherwise) of row x into y, which may be x."""
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
