"""Bits per byte, by one protocol for every model and vocabulary (docs/evaluation.md). Does not require torch."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.text_loss import TextLoss
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Ids
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.errors import UserError

BATCH_STORIES = 512  # stories scored together; the engine sorts them by length
BOOTSTRAP_RESAMPLES = 1000

StoryScores = npt.NDArray[np.float64]  # (3, stories): nats, scored tokens, bytes
EncodedStory = tuple[Ids, int]  # ids of END text END; number of UTF-8 bytes of the text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BitsReport:
    """The result of an evaluation. `tokens` counts the scored ones: those of the text and one closing END per story."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int  # UTF-8 bytes of the stories' text
    stories: int
    interval: tuple[float, float]  # 95% interval of bits per byte, by bootstrap over the stories
    seconds: float
    lost_text: float = 0.0  # share of the text that the tokenizer cannot give back; unless 0, the score is too good


def encode_stories(texts: Iterable[str], tokenizer: Tokenizer, loss: TextLoss | None = None) -> Iterator[EncodedStory]:
    """Tokenize stories, in batches, and yield (ids of END text END, number of UTF-8 bytes) for each.

    What the tokenizer loses of them is added to `loss`.
    """
    texts = iter(texts)
    while batch := list(itertools.islice(texts, BATCH_STORIES)):
        batch_ids = tokenizer.encode_batch(batch)
        if loss is not None:
            loss.add(tokenizer, batch, batch_ids)
        for text, ids in zip(batch, batch_ids, strict=True):
            yield [tokenizer.end_id, *ids, tokenizer.end_id], len(text.encode())


def read_prepared_stories(
    tokens: npt.NDArray[np.integer[Any]], index: npt.NDArray[np.integer[Any]], limit: int = 0
) -> Iterator[EncodedStory]:
    """Yield stories of a prepared split (from `data.dataset.open_split`): all, or `limit` evenly spaced ones.

    `index` holds one (first token, first byte) row per story and one more row for the end.
    """
    n_stories = len(index) - 1
    selected = range(n_stories) if not 0 < limit < n_stories else (i * n_stories // limit for i in range(limit))
    for i in selected:
        # A story is stored as END text; the END that opens the next one closes it.
        start, stop = int(index[i, 0]), int(index[i + 1, 0])
        yield tokens[start : stop + 1], int(index[i + 1, 1] - index[i, 1])


def evaluate_bits_per_byte(
    engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None
) -> BitsReport:
    """Score every story independently, given its opening END, and return the totals.

    `progress` is called with the number of stories scored so far. Memory grows by only three numbers per story. Raises
    `UserError` if `stories` is empty or a probability is not finite.
    """
    started_at = time.perf_counter()
    return summarize(score_stories(engine, stories, progress), time.perf_counter() - started_at)


def score_stories(
    engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None
) -> StoryScores:
    """Return an array (3, stories) with the nats, scored tokens and bytes of each story.

    Stories longer than the context are scored with a window that slides by half a context. `progress` is called with
    the number of stories scored so far.
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
    """Aggregate the scores of all stories. Raises `UserError` if there are none or a score is not finite."""
    nats, tokens, byte_counts = scores
    if not byte_counts.sum():
        raise UserError("no stories to evaluate; pass data that contains at least one")
    total_nats, n_bytes = float(nats.sum()), int(byte_counts.sum())
    if not math.isfinite(total_nats):
        raise UserError("the model's probabilities are not finite; its weights are damaged: use another checkpoint")
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
    """Return the 95% interval of sum(bits) / sum(bytes), by resampling stories with a fixed seed.

    Efron's percentile bootstrap.
    """
    rng = np.random.default_rng(0)
    ratios = np.empty(BOOTSTRAP_RESAMPLES)
    for i in range(BOOTSTRAP_RESAMPLES):
        resample = rng.integers(0, len(bits), len(bits))
        ratios[i] = bits[resample].sum() / max(1, n_bytes[resample].sum())
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
