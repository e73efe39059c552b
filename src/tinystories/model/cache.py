"""KV cache: preallocated keys and values with a length per row. It is passed to the model and has static shapes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinystories.config import ModelConfig


def causal_mask(positions: Int[Tensor, "B T"], kv_len: int, window: int = 0) -> Bool[Tensor, "B 1 T S"]:
    """Return a mask that is True where a query may attend: key positions up to its own and below `kv_len`.

    With `window` > 0 a query attends to the last `window` of them only (sliding-window attention), itself included.
    """
    key_positions, query_positions = torch.arange(kv_len, device=positions.device), positions[..., None]
    mask = key_positions <= query_positions
    return (mask & (key_positions > query_positions - window) if window else mask)[:, None]


class KVCache:
    """Preallocated keys and values, (layer, B, H_kv, n_ctx, D); row b holds `length[b]` tokens.

    `kv_len` is a host integer: attention reads only the first `kv_len` cached positions. It must be at least the
    longest row length after the call. A small `kv_len` saves work; a constant one keeps shapes static (CUDA graphs).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layer, batch, config.kv_heads, config.n_ctx, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, device=device, dtype=torch.long)
        self.kv_len = config.n_ctx

    def view_rows(self, start: int, stop: int) -> "KVCache":
        """Return rows start..stop-1 as a cache that shares memory with this one."""
        view = object.__new__(KVCache)
        view.k, view.v = self.k[:, start:stop], self.v[:, start:stop]
        view.length, view.kv_len = self.length[start:stop], self.kv_len
        return view

    def next_positions(self, n_tokens: int) -> Int[Tensor, "B T"]:
        """Return the positions of the next `n_tokens` tokens of each row."""
        return self.length[:, None] + torch.arange(n_tokens, device=self.length.device)

    def write(
        self, layer: int, k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"], positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"]]:
        """Store the new keys and values of one layer; return all cached ones up to `kv_len`.

        The row lengths do not change: the model calls `advance` once, after its last layer.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, : self.kv_len], self.v[layer, :, :, : self.kv_len]

    def advance(self, n_tokens: int) -> None:
        """Add `n_tokens` to the length of every row."""
        self.length += n_tokens
