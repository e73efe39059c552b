"""Where a token stands: sinusoids added to the embedding, or rotations of q and k.

Letters in shapes: B batch, T tokens in this call, S tokens visible to them, C = n_embd, H heads, D = head_dim, V vocab.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def sinusoid_table(n_ctx: int, n_embd: int) -> Float[Tensor, "{n_ctx} {n_embd}"]:
    """PE[p, 2i] = sin(p / 10000^(2i/C)), PE[p, 2i+1] = cos of the same (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(n_ctx, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, n_embd, 2, dtype=torch.float64) / n_embd)
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


def rotary_tables(
    n_ctx: int, head_dim: int, base: float
) -> tuple[Float[Tensor, "{n_ctx} {head_dim}"], Float[Tensor, "{n_ctx} {head_dim}"]]:
    """cos and signed sin of position x base^(-2i/D), laid out for `rotate` (RoFormer, arXiv 2104.09864).

    The halves of D are paired, as in Hugging Face's Llama and Qwen3 (not neighbouring elements, as in the paper). The
    minus of rotate-half lives in the first half of sin.
    """
    position = torch.arange(n_ctx, dtype=torch.float64)[:, None]
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = position * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Float[Tensor, "B H T D"], cos: Float[Tensor, "*rows T D"], sin: Float[Tensor, "*rows T D"]
) -> Float[Tensor, "B H T D"]:
    """Rotate each pair (i, i + D/2) of every head by its position's angle; rows is nothing, or B 1."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
