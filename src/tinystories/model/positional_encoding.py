"""Positional encodings: sinusoids added to the embedding, or rotary position embeddings (RoPE) of q and k.

Letters in shapes: B batch, T tokens in this call, S tokens visible to them, C = n_embd, H heads, D = head_dim, V vocab.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tinystories import position_tables


def build_sinusoid_table(n_ctx: int, n_embd: int) -> Float[Tensor, "{n_ctx} {n_embd}"]:
    """Return the sinusoidal position table as fp32, on the default device like the weights."""
    return torch.tensor(position_tables.build_sinusoid_table(n_ctx, n_embd))


def build_rope_tables(
    n_ctx: int, head_dim: int, base: float
) -> tuple[Float[Tensor, "{n_ctx} {head_dim}"], Float[Tensor, "{n_ctx} {head_dim}"]]:
    """Return cos and sin for `apply_rope`. The minus sign of rotate-half is folded into the first half of sin."""
    cos, sin = map(torch.tensor, position_tables.build_rope_tables(n_ctx, head_dim, base))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(
    x: Float[Tensor, "B H T D"], cos: Float[Tensor, "*rows T D"], sin: Float[Tensor, "*rows T D"]
) -> Float[Tensor, "B H T D"]:
    """Rotate each pair (i, i + D/2) of every head by the angle of its position.

    `cos` and `sin` are (T, D), or (B, 1, T, D) if positions differ between rows.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
