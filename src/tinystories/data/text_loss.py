"""How much of a text a tokenizer loses: words that become <unk>, upper case, accents, white space.

Bits per byte count all bytes of a text. A model need not predict what its tokenizer has lost, so its score is too good.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy.typing as npt

from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import quoted

MIN_SHARE = 0.001  # less is neglected: it changes a score by less than the choice of the stories does
EXAMPLE_CHARS = 24


@dataclasses.dataclass(slots=True)
class TextLoss:
    """What decoding did not restore, over all texts added so far."""

    n_chars: int = 0
    n_lost: int = 0  # characters that are missing, or are there only after decoding, whichever are more
    example: str = ""  # how the first of these texts changes

    def add(self, tokenizer: Tokenizer, texts: Sequence[str], batch_ids: Sequence[npt.ArrayLike]) -> None:
        """Add texts and their ids, without END."""
        if tokenizer.is_lossless:
            self.n_chars += sum(map(len, texts))
            return
        for text, ids in zip(texts, batch_ids, strict=True):
            self.n_chars += len(text)
            restored = tokenizer.decode(ids)  # type: ignore[arg-type]
            if restored != text:
                before, after = collections.Counter(text), collections.Counter(restored)
                self.n_lost += max((before - after).total(), (after - before).total())
                self.example = self.example or describe_change(text, restored)

    @property
    def share(self) -> float:
        """The lost characters as a fraction of all, at most 1; 0 if they are fewer than MIN_SHARE."""
        share = min(1.0, self.n_lost / max(1, self.n_chars))
        return share if share >= MIN_SHARE else 0.0


def describe_change(text: str, restored: str) -> str:
    """Return the first difference of two texts in words."""
    pairs = enumerate(itertools.zip_longest(text, restored))
    start = max(0, next(i for i, (a, b) in pairs if a != b) - 8)
    before, after = (quoted(x[start : start + EXAMPLE_CHARS]) for x in (text, restored))
    return f"{before} comes back as {after}"


def describe_loss(share: float) -> str:
    """Return what to print beside bits per byte: "" if the tokenizer loses nothing (`TextLoss.share`)."""
    return f"not comparable: the tokenizer cannot give back {share:.1%} of the text" if share else ""


def mark_incomparable(text: str, share: float) -> str:
    """Return a text that states bits per byte, followed by `describe_loss` in parentheses if there is a loss."""
    return f"{text} ({describe_loss(share)})" if share else text
