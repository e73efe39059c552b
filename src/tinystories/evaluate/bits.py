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
from tinystories.engine.windows import sliding_logprobs
from tinystories.errors import UserError

BLOCK = 512  # stories scored together; the engine sorts them by length
RESAMPLES = 1000  # of the bootstrap

Scores = npt.NDArray[np.float64]
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


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[EncodedStory]:
    """Stories given as text."""
    texts = iter(texts)
    while block := list(itertools.islice(texts, BLOCK)):
        for text, ids in zip(block, tokenizer.encode_batch(block), strict=True):
            yield [tokenizer.end_id, *ids, tokenizer.end_id], len(text.encode())


def prepared(
    tokens: npt.NDArray[np.integer[Any]], index: npt.NDArray[np.integer[Any]], limit: int = 0
) -> Iterator[EncodedStory]:
    """Stories of a prepared split (`data.prepared.open_split`): all, or `limit` of them, evenly spaced."""
    n_stories = len(index) - 1
    chosen = range(n_stories) if not 0 < limit < n_stories else (i * n_stories // limit for i in range(limit))
    for i in chosen:
        start, stop = int(index[i, 0]), int(index[i + 1, 0])
        yield tokens[start : stop + 1], int(index[i + 1, 1] - index[i, 1])


def bits_per_byte(
    engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None
) -> BitsReport:
    """Score every story on its own, after its opening END; `progress` is told how many stories are done.

    Memory does not grow with the number of stories, but for three numbers of each. `UserError` when there is nothing
    to score.
    """
    began = time.perf_counter()
    return report(scores(engine, stories, progress), time.perf_counter() - began)


def scores(engine: Engine, stories: Iterable[EncodedStory], progress: Callable[[int], None] | None = None) -> Scores:
    """Nats, scored tokens and bytes (3 rows) of each story (a column).

    Stories longer than the context are scored by windows that slide by half of it.
    """
    blocks = [np.empty((3, 0))]
    done = 0
    stories = iter(stories)
    while block := list(itertools.islice(stories, BLOCK)):
        logprobs = sliding_logprobs(engine, [ids for ids, _ in block])
        rows = zip(logprobs, block, strict=True)
        blocks.append(np.array([(-logprob.sum(), len(logprob), n_bytes) for logprob, (_, n_bytes) in rows]).T)
        done += len(block)
        if progress is not None:
            progress(done)
    return np.concatenate(blocks, axis=1)


def report(scores: Scores, seconds: float) -> BitsReport:
    """The sums over all stories."""
    nats, tokens, sizes = scores
    if not sizes.sum():
        raise UserError("there are no stories to evaluate; give data that holds some")
    total, n_bytes = float(nats.sum()), int(sizes.sum())
    if not math.isfinite(total):
        raise UserError(
            "the model gives probabilities that are not finite; its weights are damaged, use another checkpoint"
        )
    return BitsReport(
        bits_per_byte=total / math.log(2) / n_bytes,
        nats_per_token=total / int(tokens.sum()),
        tokens=int(tokens.sum()),
        bytes=n_bytes,
        stories=len(nats),
        interval=bootstrap(nats / math.log(2), sizes.astype(np.int64)),
        seconds=seconds,
    )


def bootstrap(bits: npt.NDArray[np.float64], n_bytes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """95 % interval of sum(bits) / sum(bytes) by resampling stories (Efron's percentile method), from a fixed seed."""
    rng = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, len(bits), len(bits))
        ratios[i] = bits[drawn].sum() / max(1, n_bytes[drawn].sum())
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
