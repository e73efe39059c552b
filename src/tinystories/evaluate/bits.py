"""Quality as bits per byte, by one protocol for every model and vocabulary (docs/evaluation.md). Needs no torch."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Ids
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.errors import UserError

BATCH_STORIES = 512  # stories scored together; the engine sorts them by length
BOOTSTRAP_RESAMPLES = 1000  # of the bootstrap

StoryScores = npt.NDArray[np.float64]
EncodedStory = tuple[Ids, int]  # END text END, and the UTF-8 bytes of the text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BitsReport:
    """`tokens` are those scored: the text's and one closing END for each story."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int  # UTF-8, of the stories' text
    stories: int
    interval: tuple[float, float]  # 95 % of bits per byte, by a bootstrap over the stories
    seconds: float


def encode_stories(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[EncodedStory]:
    """Stories given as text."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH_STORIES)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield [tokenizer.end_id, *ids, tokenizer.end_id], len(text.encode())


def read_prepared_stories(
    tokens: npt.NDArray[np.integer[Any]], index: npt.NDArray[np.integer[Any]], limit: int = 0
) -> Iterator[EncodedStory]:
    """Stories of a prepared split (`data.prepared.open_split`): all, or `limit` of them, evenly spaced."""
    n_stories = len(index) - 1
    selected = range(n_stories) if not 0 < limit < n_stories else (i * n_stories // limit for i in range(limit))
    for i in selected:
        start, stop = int(index[i, 0]), int(index[i + 1, 0])
        yield tokens[start : stop + 1], int(index[i + 1, 1] - index[i, 1])


def evaluate_bits_per_byte(
    engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None
) -> BitsReport:
    """Score every story on its own, after its opening END; `progress` is told how many stories are done.

    Memory does not grow with the number of stories, but for three numbers of each. `UserError` when there is nothing
    to score.
    """
    started_at = time.perf_counter()
    return summarize(score_stories(engine, stories, progress), time.perf_counter() - started_at)


def score_stories(
    engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None
) -> StoryScores:
    """Nats, scored tokens and bytes (3 rows) of each story (a column).

    Stories longer than the context are scored by windows that slide by half of it.
    """
    score_batches = [np.empty((3, 0))]
    done = 0
    stories = iter(stories)
    while batch := list(itertools.islice(stories, BATCH_STORIES)):
        logprobs = sliding_window_logprobs(engine, [ids for ids, _ in batch])
        rows = zip(logprobs, batch, strict=True)
        score_batches.append(np.array([(-logprob.sum(), len(logprob), n_bytes) for logprob, (_, n_bytes) in rows]).T)
        done += len(batch)
        if progress is not None:
            progress(done)
    return np.concatenate(score_batches, axis=1)


def summarize(scores: StoryScores, seconds: float) -> BitsReport:
    """The sums over all stories."""
    nats, tokens, byte_counts = scores
    if not byte_counts.sum():
        raise UserError("there are no stories to evaluate; give data that holds some")
    total_nats, n_bytes = float(nats.sum()), int(byte_counts.sum())
    if not math.isfinite(total_nats):
        raise UserError(
            "the model gives probabilities that are not finite; its weights are damaged, use another checkpoint"
        )
    return BitsReport(
        bits_per_byte=total_nats / math.log(2) / n_bytes,
        nats_per_token=total_nats / int(tokens.sum()),
        tokens=int(tokens.sum()),
        bytes=n_bytes,
        stories=len(nats),
        interval=bootstrap_interval(nats / math.log(2), byte_counts.astype(np.int64)),
        seconds=seconds,
    )


def bootstrap_interval(bits: npt.NDArray[np.float64], n_bytes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """95 % interval of sum(bits) / sum(bytes) by resampling stories (Efron's percentile method), from a fixed seed."""
    rng = np.random.default_rng(0)
    ratios = np.empty(BOOTSTRAP_RESAMPLES)
    for i in range(BOOTSTRAP_RESAMPLES):
        resample = rng.integers(0, len(bits), len(bits))
        ratios[i] = bits[resample].sum() / max(1, n_bytes[resample].sum())
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
