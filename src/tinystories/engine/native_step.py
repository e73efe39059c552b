"""One token at a time on a CPU in fp32: a torch model's own weights, through the machine code of `engine.cpu`."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinystories.engine.cpu.runtime import MAX_ROWS, Runtime
from tinystories.model import GPT, KVCache

MAX_NATIVE_ROWS = min(32, MAX_ROWS)  # with more rows the model's products by BLAS are faster (docs/log.md)


class NativeStep:
    """The same function as `model.logits(model(tokens, cache))` for one token in each row, within fp32 rounding.

    Shares the memory of the model's weights: training in place is seen, replaced tensors are not.
    """

    def __init__(self, model: GPT) -> None:
        weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        self.runtime = Runtime(model.config, weights, torch.get_num_threads())

    def __call__(self, tokens: Int[Tensor, " B"], cache: KVCache, positions: Sequence[int]) -> Float[Tensor, "B V"]:
        """Logits after one token in each row of the cache, written at the given positions (the rows' lengths)."""
        n_slots = cache.k.stride(0) // cache.k.stride(1)  # of the whole cache, of which this may be a part
        logits = self.runtime.run(
            tokens.numpy(),
            np.arange(len(tokens)),
            np.asarray(positions),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            n_slots,
        )
        return torch.from_numpy(logits.copy())
