"""Statistics of generated text: loops, copies of training data, diversity. Words are lowercase runs of letters and
digits.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

WORD_PATTERN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NAME_PATTERN = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")  # a capitalized word inside a sentence
CAPITALIZED_PATTERN = re.compile(r"\b[A-Z][a-z]+\b")
# A story loops if some run of LOOP_NGRAM words occurs at least LOOP_REPEATS times in it.
LOOP_NGRAM = 6
LOOP_REPEATS = 3
COPY_NGRAM = 13  # a run of this many words that occurs in the training stories counts as copied
OPENING_WORDS = 8  # the opening of a story is its first 8 words

Hashes = npt.NDArray[np.int64]


def split_words(text: str) -> list[str]:
    """Return the lowercase words of a text, without punctuation."""
    return WORD_PATTERN.findall(text.lower())


def ngrams(sequence: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield every n-gram of the sequence, in order."""
    return zip(*(sequence[i:] for i in range(n)), strict=False)


def has_loop(text: str) -> bool:
    """Return whether some 6-gram of words occurs at least three times."""
    counts = Counter(ngrams(split_words(text), LOOP_NGRAM))
    return max(counts.values(), default=0) >= LOOP_REPEATS


def extract_names(text: str) -> set[str]:
    """Return the capitalized words that do not begin a sentence."""
    return set(NAME_PATTERN.findall(text))


def count_late_names(text: str) -> tuple[int, int]:
    """Count the names in the second half of a story: those that its first half does not have, and all."""
    first_half, second_half = text[: len(text) // 2], text[len(text) // 2 :]
    known = set(CAPITALIZED_PATTERN.findall(first_half))
    names = NAME_PATTERN.findall(second_half)
    return sum(name not in known for name in names), len(names)


def hash_ngrams(text: str) -> Hashes:
    """Return a hash of each 13-gram of words; comparable only within one process (Python salts its string hashes)."""
    return np.fromiter(map(hash, ngrams(split_words(text), COPY_NGRAM)), dtype=np.int64)


class NgramIndex:
    """The set of all 13-grams of words of some stories, as hashes (8 bytes each)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, np.int64), *map(hash_ngrams, texts)]))

    def copied_fraction(self, texts: Iterable[str]) -> float:
        """Return the fraction of 13-grams in `texts` that are in the index; 0 if `texts` has none."""
        ngram_hashes = np.concatenate([np.empty(0, np.int64), *map(hash_ngrams, texts)])
        return float(np.isin(ngram_hashes, self.hashes).mean()) if len(ngram_hashes) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiversityStats:
    """Diversity of a set of stories.

    Fractions are of the stories, except `distinct_trigrams`, which is a fraction of all word trigrams.
    """

    stories: int
    words: float  # mean number of words per story
    looping: float  # fraction with a loop
    distinct_openings: float  # number of distinct first 8 words / stories
    names: int  # number of distinct names
    commonest_name: float  # fraction of stories that contain the most common name
    late_names: float  # of the names in the second halves, the fraction that the story did not have before
    distinct_trigrams: float  # distinct word trigrams / all word trigrams


def measure_diversity(texts: Sequence[str]) -> DiversityStats:
    """Return the diversity of at least one story.

    The numbers depend on how many stories there are: compare only with the same number of stories, e.g. of the data.
    """
    story_words = [split_words(text) for text in texts]
    name_counts = Counter(name for text in texts for name in extract_names(text))
    trigrams = [run for word_list in story_words for run in ngrams(word_list, 3)]
    late_names, second_half_names = map(sum, zip(*map(count_late_names, texts), strict=True))
    return DiversityStats(
        stories=len(texts),
        words=sum(map(len, story_words)) / len(texts),
        looping=sum(map(has_loop, texts)) / len(texts),
        distinct_openings=len({tuple(word_list[:OPENING_WORDS]) for word_list in story_words}) / len(texts),
        names=len(name_counts),
        commonest_name=max(name_counts.values(), default=0) / len(texts),
        late_names=late_names / max(1, second_half_names),
        distinct_trigrams=len(set(trigrams)) / max(1, len(trigrams)),
    )
