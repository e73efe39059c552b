"""The two layouts of RoPE's rotated pairs in the rows of the q and k projections.

Our layout (Hugging Face's) pairs dimension i of a head with i + head_dim / 2; Llama's original, and so llama2.c and
GGUF, pairs adjacent dimensions. Attention scores do not change, as long as q and k are reordered alike.
"""

from tinystories.formats.bundle import Array


def permute_rope(weight: Array, head_dim: int) -> Array:
    """Reorder the rows of q or k from our RoPE layout (halves of a head) to adjacent pairs."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def unpermute_rope(weight: Array, head_dim: int) -> Array:
    """Reorder the rows of q or k from adjacent pairs to our RoPE layout (halves of a head)."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
