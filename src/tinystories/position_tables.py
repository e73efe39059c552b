"""Position tables in NumPy, shared by both engines: sinusoids, and the cos and sin of RoPE."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def sinusoid_frequencies(n_embd: int) -> npt.NDArray[np.float64]:
    """Return 10000^(-2i/C) for each pair of columns, (n_embd/2,)."""
    return 10000.0 ** (-np.arange(0, n_embd, 2) / n_embd)


def rope_frequencies(head_dim: int, base: float) -> npt.NDArray[np.float64]:
    """Return base^(-2i/D) for each pair of dimensions, (D/2,)."""
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def build_sinusoid_table(n_ctx: int, n_embd: int) -> Floats:
    """Return the (n_ctx, n_embd) table PE[p, 2i] = sin(p / 10000^(2i/C)), PE[p, 2i+1] = cos(p / 10000^(2i/C)).

    Source: Vaswani et al. 2017, section 3.5.
    """
    angle = np.arange(n_ctx)[:, None] * sinusoid_frequencies(n_embd)
    return np.stack((np.sin(angle), np.cos(angle)), axis=-1).reshape(n_ctx, -1).astype(np.float32)


def build_rope_tables(n_ctx: int, head_dim: int, base: float) -> tuple[Floats, Floats]:
    """Return cos and sin of position * base^(-2i/D), (n_ctx, D/2) each (RoFormer, arXiv 2104.09864).

    For use with pairs (i, i + D/2), as in Hugging Face's Llama and Qwen3; the paper pairs adjacent elements.
    """
    angle = np.arange(n_ctx)[:, None] * rope_frequencies(head_dim, base)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
