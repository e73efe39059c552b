"""Decode steps on a CUDA device as a CUDA graph: recorded once and replayed, without a launch per kernel."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tinystories.model import GPT, KVCache

# Libraries allocate memory and select kernels in their first calls; the graph must not record that.
WARMUP_STEPS = 3


class CudaGraphStep:
    """`model.logits(model(tokens, cache))` for one token in each of the first `n_rows` rows of a KV cache.

    All shapes are static: attention reads the whole cache through a mask.
    """

    def __init__(self, model: GPT, cache: KVCache, n_rows: int, lengths: Sequence[int]) -> None:
        """Record the graph. `lengths` are the current lengths of the rows, as in `__call__`.

        Warming up and recording write only at these positions, which the next decode step overwrites.
        """
        self.model = model
        self.cache_view = cache.view_rows(0, n_rows)
        self.tokens = torch.zeros((n_rows, 1), dtype=torch.long, device=cache.k.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(cache.k.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    self.cache_view.length.copy_(torch.tensor(lengths))
                    self.run()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.logits = self.run()

    def run(self) -> Float[Tensor, "B V"]:
        """Run the step eagerly on the static inputs `tokens` and `cache_view`; this is what the graph records."""
        return self.model.logits(self.model(self.tokens, self.cache_view)[:, -1]).float()

    def __call__(self, tokens: npt.NDArray[np.int64], lengths: Sequence[int]) -> Float[Tensor, "B V"]:
        """Return the logits after one token per row, written to the cache at position `lengths[row]`."""
        self.tokens.copy_(torch.from_numpy(tokens)[:, None])
        self.cache_view.length.copy_(torch.tensor(lengths))
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites the recorded result
