"""`SamplingState`: what a sampler needs to know about each slot of an engine."""

import collections
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinystories.config import SamplingConfig
from tinystories.engine.cpu.kernels.layout import SAMPLING, SAMPLING_BLOCK

# Temperatures outside this range are clamped, because they would underflow or overflow in fp32. They sample the same
# tokens: the most likely ones, or all alike.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30


class SamplingState:
    """The sampling settings of each slot, and the ids that its repetition penalty applies to."""

    def __init__(self, n_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.settings = [SamplingConfig()] * n_slots
        # The same for compiled code: a row of `SamplingLayout` for each slot.
        self.parameters = np.zeros((n_slots, SAMPLING.size), dtype=np.float64)
        # Not written for slots without a penalty, so that their memory is never committed.
        self.seen = np.zeros((n_slots, self.pad(vocab_size)), dtype=np.bool_)
        self.parameters_address, self.seen_address = self.parameters.ctypes.data, self.seen.ctypes.data

    @staticmethod
    def pad(vocab_size: int) -> int:
        """Return the length of a row of `seen`: whole blocks."""
        return -(-vocab_size // SAMPLING_BLOCK) * SAMPLING_BLOCK

    def begin(
        self, slot: int, settings: SamplingConfig, prompt_ids: Sequence[int], name_ids: frozenset[int] = frozenset()
    ) -> "SeenIds | None":
        """Set up a slot for a story.

        `name_ids` are those that `penalize_names` spares. Returns what the caller must tell each id that follows; None
        without a penalty.
        """
        self.settings[slot] = settings
        row = self.parameters[slot]
        row[SAMPLING.temperature] = settings.temperature and clamp_temperature(settings.temperature)
        row[SAMPLING.top_k], row[SAMPLING.top_p] = min(settings.top_k, self.vocab_size), settings.top_p
        row[SAMPLING.min_p], row[SAMPLING.logit_gap] = settings.min_p, logit_gap(settings)
        row[SAMPLING.repetition_penalty] = settings.repetition_penalty
        if settings.repetition_penalty == 1:
            return None
        self.seen[slot] = False
        spared_ids = frozenset() if settings.penalize_names else name_ids
        seen = SeenIds(self.seen[slot, : self.vocab_size], settings.repetition_window, spared_ids)
        for token in prompt_ids:
            seen.add(token)
        return seen

    def seen_mask(self, slots: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return (len(slots), V): which ids the repetition penalty of each slot applies to."""
        return self.seen[slots, : self.vocab_size]


class SeenIds:
    """Keeps the ids that the repetition penalty of a slot applies to: those of the last `window` tokens (0: of all)."""

    def __init__(self, row: npt.NDArray[np.bool_], window: int, spared_ids: frozenset[int]) -> None:
        self.row, self.window, self.spared_ids = row, window, spared_ids
        self.recent: collections.deque[int] = collections.deque()
        self.counts: collections.Counter[int] = collections.Counter()  # of the ids in `recent`

    def add(self, token: int) -> None:
        """Append a token of the story."""
        if token < len(self.row) and token not in self.spared_ids:  # the engine refuses ids outside the vocabulary
            self.row[token] = True
        if not self.window:
            return
        self.recent.append(token)
        self.counts[token] += 1
        if len(self.recent) > self.window:
            oldest = self.recent.popleft()
            self.counts[oldest] -= 1
            if not self.counts[oldest] and oldest < len(self.row):
                self.row[oldest] = False


def clamp_temperature(temperature: float) -> float:
    """Return a temperature that fp32 logits can be divided by; the temperature must not be 0."""
    return float(min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE))


def logit_gap(settings: SamplingConfig) -> float:
    """Return how far below the largest logit another one may be (negative) and be sampled, or a bit more.

    Others are rejected by min_p, or their weight is rounded to 0 (`generate.sampling.exp`). This is the solution of
    2^30 exp(gap / temperature) = 1/2, or of exp(gap / temperature) = min_p, with a margin for rounding. With top_p,
    min_p does not count, since it comes later and top_p is a share of the weights before.
    """
    smallest = 2.0**-31 if settings.top_p < 1 else max(settings.min_p, 2.0**-31)
    return clamp_temperature(settings.temperature) * (math.log(smallest) * 1.001 - 1e-6)
