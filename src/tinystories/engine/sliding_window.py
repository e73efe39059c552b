"""Score sequences of any length with a sliding window (stride: half a context). Does not require torch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.protocol import Engine, Ids


def iter_windows(n_ids: int, n_ctx: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, first) of each window over n_ids >= 2 ids: the engine reads ids[start:stop] and the
    log-probabilities of ids[first:stop] are used.

    Windows start every n_ctx // 2 ids and hold at most n_ctx + 1. Every id except the very first is scored exactly
    once; after the first window, at least n_ctx // 2 ids of the same window precede it.
    """
    start, first = 0, 1
    while first < n_ids:
        stop = min(start + n_ctx + 1, n_ids)
        yield start, stop, first
        start, first = start + max(1, n_ctx // 2), stop


def sliding_window_logprobs(engine: Engine, sequences: Sequence[Ids]) -> list[npt.NDArray[np.float64]]:
    """Return the log-probabilities (nats) of every id except the first, for sequences of any length >= 2."""
    n_ctx = engine.config.n_ctx
    plan = [(i, *window) for i, ids in enumerate(sequences) for window in iter_windows(len(ids), n_ctx)]
    window_logprobs = engine.logprobs([sequences[i][start:stop] for i, start, stop, _ in plan])
    parts: list[list[npt.NDArray[np.floating[Any]]]] = [[] for _ in sequences]
    for (i, start, _, first), logprob in zip(plan, window_logprobs, strict=True):
        parts[i].append(logprob[first - start - 1 :])  # logprob[j] belongs to ids[start + j + 1]
    return [np.concatenate(part, dtype=np.float64) for part in parts]
