"""The parts of a transformer block as functions of NumPy arrays, in fp32.

Letters in shapes: T tokens, C = n_embd, D = head_dim.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it."""
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centered).mean(axis=-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * weight + bias


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Divide the last axis by its root mean square, then scale it (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def apply_rope(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate each pair (i, i + D/2) of x (..., T, D) by the angle of its position; cos and sin are (T, D/2)."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def softmax(scores: Floats) -> Floats:
    """Turn each row of scores into probabilities, in place; a score of -inf becomes 0."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def causal_mask(n_tokens: int, window: int = 0) -> Floats:
    """Return (T, T) to add to attention scores: -inf where the token of the row must not see that of the column.

    A token sees itself and the tokens before it; with a window, itself and the window - 1 tokens before it.
    """
    query, key = np.ogrid[:n_tokens, :n_tokens]
    visible = (key <= query) & (query - key < (window or n_tokens))
    return np.where(visible, 0, np.float32(-np.inf))


def silu(x: Floats) -> Floats:
    """Return x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        return x / (np.exp(-x) + 1)


def activate(x: Floats, activation: str) -> Floats:
    """Apply the activation of a `classic` MLP: relu, gelu_tanh (GPT-2's approximation) or gelu_erf (exact)."""
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + np.tanh(inner))
    assert activation == "gelu_erf", activation
    return x * normal_cdf(x)


def normal_cdf(x: Floats) -> Floats:
    """Return (1 + erf(x / sqrt(2))) / 2 with an error below 1e-7: NumPy has no erf.

    Abramowitz and Stegun, formula 7.1.26.
    """
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    y = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = y * t + coefficient
    upper_tail = 0.5 * y * t * np.exp(-z * z)
    return np.where(x > 0, 1 - upper_tail, upper_tail)
