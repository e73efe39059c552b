"""What can be counted in stories: loops, copies, variety. Words are runs of letters and digits, in lower case."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

WORD_PATTERN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NAME_PATTERN = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")  # a capital within a sentence
LOOP_NGRAM = 6  # words which, three times in one story, are a loop
LOOP_REPEATS = 3
COPY_NGRAM = 13  # words which, found in the training stories, are a copy
OPENING_WORDS = 8  # words

Hashes = npt.NDArray[np.int64]


def split_words(text: str) -> list[str]:
    return WORD_PATTERN.findall(text.lower())


def ngrams(sequence: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every run of n words, in order."""
    return zip(*(sequence[i:] for i in range(n)), strict=False)


def has_loop(text: str) -> bool:
    """Whether some 6 words in a row come three times."""
    counts = Counter(ngrams(split_words(text), LOOP_NGRAM))
    return max(counts.values(), default=0) >= LOOP_REPEATS


def extract_names(text: str) -> set[str]:
    """Words with a capital that do not begin a sentence."""
    return set(NAME_PATTERN.findall(text))


def hash_ngrams(text: str) -> Hashes:
    """A number for each 13 words in a row; the same within one process only."""
    return np.fromiter(map(hash, ngrams(split_words(text), COPY_NGRAM)), dtype=np.int64)


class NgramIndex:
    """All runs of 13 words of some stories; 8 bytes for each."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, np.int64), *map(hash_ngrams, texts)]))

    def copied_fraction(self, texts: Iterable[str]) -> float:
        """Which share of the runs of 13 words in `texts` is among them; 0 where there are none."""
        ngram_hashes = np.concatenate([np.empty(0, np.int64), *map(hash_ngrams, texts)])
        return float(np.isin(ngram_hashes, self.hashes).mean()) if len(ngram_hashes) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiversityStats:
    """Of several stories. Shares are of the stories, but for `distinct_trigrams`, a share of all runs of 3 words."""

    stories: int
    words: float  # mean of a story
    looping: float
    distinct_openings: float  # first 8 words
    names: int  # different ones
    commonest_name: float  # share of stories with the commonest one
    distinct_trigrams: float


def measure_diversity(texts: Sequence[str]) -> DiversityStats:
    """Counts over stories (at least one). Those of equally many stories of the data are what to compare them with."""
    story_words = [split_words(text) for text in texts]
    name_counts = Counter(name for text in texts for name in extract_names(text))
    trigrams = [run for word_list in story_words for run in ngrams(word_list, 3)]
    return DiversityStats(
        stories=len(texts),
        words=sum(map(len, story_words)) / len(texts),
        looping=sum(map(has_loop, texts)) / len(texts),
        distinct_openings=len({tuple(found[:OPENING_WORDS]) for found in story_words}) / len(texts),
        names=len(name_counts),
        commonest_name=max(name_counts.values(), default=0) / len(texts),
        distinct_trigrams=len(set(trigrams)) / max(1, len(trigrams)),
    )
