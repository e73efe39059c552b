"""Where a token stands: sinusoids added to the embedding, or rotations of q and k.

Letters in shapes: B batch, T tokens in this call, S tokens visible to them, C = n_embd, H heads, D = head_dim, V vocab.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tinystories import position_tables


def build_sinusoid_table(n_ctx: int, n_embd: int) -> Float[Tensor, "{n_ctx} {n_embd}"]:
    return torch.tensor(
        position_tables.build_sinusoid_table(n_ctx, n_embd)
    )  # on the default device, as the weights are


def build_rope_tables(
    n_ctx: int, head_dim: int, base: float
) -> tuple[Float[Tensor, "{n_ctx} {head_dim}"], Float[Tensor, "{n_ctx} {head_dim}"]]:
    """cos and signed sin laid out for `rotate`: the minus of rotate-half lives in the first half of sin."""
    cos, sin = map(torch.tensor, position_tables.build_rope_tables(n_ctx, head_dim, base))
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(
    x: Float[Tensor, "B H T D"], cos: Float[Tensor, "*rows T D"], sin: Float[Tensor, "*rows T D"]
) -> Float[Tensor, "B H T D"]:
    """Rotate each pair (i, i + D/2) of every head by its position's angle; rows is nothing, or B 1."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
