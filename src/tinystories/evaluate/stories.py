"""What can be counted in stories: loops, copies, variety. Words are runs of letters and digits, in lower case."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NAMED = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")  # a capital within a sentence
LOOP = 6  # words which, three times in one story, are a loop
TIMES = 3
COPY = 13  # words which, found in the training stories, are a copy
OPENING = 8  # words

Hashes = npt.NDArray[np.int64]


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def ngrams(found: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n words, in order."""
    return zip(*(found[i:] for i in range(n)), strict=False)


def loops(text: str) -> bool:
    """Whether some 6 words in a row come three times."""
    counts = Counter(ngrams(words(text), LOOP))
    return max(counts.values(), default=0) >= TIMES


def names(text: str) -> set[str]:
    """Words with a capital that do not begin a sentence."""
    return set(NAMED.findall(text))


def hashed(text: str) -> Hashes:
    """A number for each 13 words in a row; the same within one process only."""
    return np.fromiter(map(hash, ngrams(words(text), COPY)), dtype=np.int64)


class Seen:
    """All runs of 13 words of some stories; 8 bytes for each."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, np.int64), *map(hashed, texts)]))

    def copied(self, texts: Iterable[str]) -> float:
        """Which share of the runs of 13 words in `texts` is among them; 0 where there are none."""
        runs = np.concatenate([np.empty(0, np.int64), *map(hashed, texts)])
        return float(np.isin(runs, self.hashes).mean()) if len(runs) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variety:
    """Of several stories. Shares are of the stories, but for `distinct_trigrams`, a share of all runs of 3 words."""

    stories: int
    words: float  # mean of a story
    looping: float
    distinct_openings: float  # first 8 words
    names: int  # different ones
    commonest_name: float  # share of stories with the commonest one
    distinct_trigrams: float


def variety(texts: Sequence[str]) -> Variety:
    """Counts over stories (at least one). Those of equally many stories of the data are what to compare them with."""
    spoken = [words(text) for text in texts]
    named = Counter(name for text in texts for name in names(text))
    trigrams = [run for found in spoken for run in ngrams(found, 3)]
    return Variety(
        stories=len(texts),
        words=sum(map(len, spoken)) / len(texts),
        looping=sum(map(loops, texts)) / len(texts),
        distinct_openings=len({tuple(found[:OPENING]) for found in spoken}) / len(texts),
        names=len(named),
        commonest_name=max(named.values(), default=0) / len(texts),
        distinct_trigrams=len(set(trigrams)) / max(1, len(trigrams)),
    )
