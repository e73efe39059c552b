"""Calls the compiled sampler of `kernels.sampling`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.cpu import jit
from tinystories.engine.sampling_state import SamplingState
from tinystories.weights.quantize import allocate_aligned

Array = npt.NDArray[Any]


class Sampler:
    """Samples the rows of a step, as `generate.sampling` does. One caller at a time."""

    def __init__(self, n_slots: int, vocab_size: int) -> None:
        self.n_slots, self.vocab_size = n_slots, vocab_size
        self.function = jit.load_sample()
        # Arguments and result of a call. Their addresses are kept: asking for one takes as long as sampling a row.
        self.slots, self.ids = np.empty(n_slots, np.int64), np.empty(n_slots, np.int64)
        self.u = np.empty(n_slots, np.float32)
        self.scratch = allocate_aligned((3, SamplingState.pad(vocab_size)), np.float32)
        self.addresses = [array.ctypes.data for array in (self.u, self.scratch, self.ids)]
        self.slots_address = self.slots.ctypes.data

    def sample(self, logits: Array, slots: Sequence[int], u: Sequence[float], state: SamplingState) -> list[int]:
        """Sample the next id of each row of logits (B, V); -1 if its largest logit is not finite."""
        n_rows = len(slots)
        assert state.seen.shape == (self.n_slots, self.scratch.shape[1]), "the state is that of another engine"
        assert logits.shape == (n_rows, self.vocab_size), "expected one row of logits for each slot"
        assert 0 <= min(slots) <= max(slots) < self.n_slots >= n_rows, "a slot does not exist"
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        self.slots[:n_rows], self.u[:n_rows] = slots, u
        self.function(
            n_rows,
            self.vocab_size,
            self.scratch.shape[1],
            logits.ctypes.data,
            self.slots_address,
            state.parameters_address,
            state.seen_address,
            *self.addresses,
        )
        return self.ids[:n_rows].tolist()
