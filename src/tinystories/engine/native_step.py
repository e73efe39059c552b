"""Decode steps of a torch model on a CPU in fp32, computed by the compiled kernels of `engine.cpu`."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinystories.engine.cpu.runtime import MAX_ROWS, KVCacheAddress, Runtime
from tinystories.model import GPT, KVCache

# With more rows, the model's own forward pass (BLAS matmuls) is faster (docs/log.md).
MAX_NATIVE_ROWS = min(32, MAX_ROWS)


class NativeStep:
    """`model.logits(model(tokens, cache))` for one token per row, equal up to fp32 rounding.

    Shares memory with the model's weights: in-place updates (training) take effect, replaced tensors do not.
    """

    def __init__(self, model: GPT) -> None:
        weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        self.runtime = Runtime(model.config, weights, torch.get_num_threads())

    def __call__(self, tokens: Int[Tensor, " B"], cache: KVCache, positions: Sequence[int]) -> Float[Tensor, "B V"]:
        """Return the logits after one token per row of the KV cache, written at `positions` (the rows' lengths)."""
        # `cache` may be a view of some rows of a larger cache (layer, n_slots, H_kv, n_ctx, D). The kernels address the
        # layers by the full number of rows, and only the strides still tell it.
        n_slots = cache.k.stride(0) // cache.k.stride(1)
        address = KVCacheAddress(cache.k.data_ptr(), cache.v.data_ptr(), n_slots)
        logits = self.runtime.run(tokens.numpy(), np.arange(len(tokens)), np.asarray(positions), address)
        return torch.from_numpy(logits.copy())
