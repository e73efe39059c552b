"""One token at a time on a CUDA device: the step is recorded once and replayed, so that launching costs nothing."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from tinystories.model import GPT, KVCache

WARMUP_STEPS = 3  # libraries allocate and choose their kernels in the first calls, which must not be recorded


class CudaGraphStep:
    """`model.logits(model(tokens, cache))` for one token in each of the first `n_rows` rows of a cache.

    All shapes are constant: attention looks at the whole cache through a mask.
    """

    def __init__(self, model: GPT, cache: KVCache, n_rows: int, lengths: Sequence[int]) -> None:
        """`lengths` as for a call: warming up writes behind them, where it does no harm."""
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
        return self.model.logits(self.model(self.tokens, self.cache_view)[:, -1]).float()

    def __call__(self, tokens: npt.NDArray[np.int64], lengths: Sequence[int]) -> Float[Tensor, "B V"]:
        self.tokens.copy_(torch.from_numpy(tokens)[:, None])
        self.cache_view.length.copy_(torch.tensor(lengths))
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites the recorded result
