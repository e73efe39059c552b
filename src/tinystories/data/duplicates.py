"""Which split a story goes to, and whether an equal one is there already: by 128-bit hashes of the text."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

Role = Literal["train", "val", "both"]  # of a source; "both": some of its stories are held out
Digests = npt.NDArray[np.uint64]  # of shape (N, 2), a row for each story

YOUNG = 1 << 17  # hashes in the Python set before they move to the sorted arrays


def digests_of(stories: Sequence[bytes]) -> Digests:
    """XXH3-128 of each story: equal for equal text; two others among 10^9 meet with a chance of 10^-21."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, stories)), "<u8").reshape(-1, 2)


def held_out(digests: Digests, fraction: float) -> npt.NDArray[np.bool_]:
    """Which stories belong to validation; depends on their text alone, not on order or neighbours."""
    val: npt.NDArray[np.bool_] = digests[:, 0] >> np.uint64(32) < int(fraction * 2**32)
    return val


class Seen:
    """A growing set of hashes: sorted arrays for the many, a Python set for the latest.

    A Python set alone takes some 110 bytes per story, 300 MB for the whole of TinyStories.
    """

    def __init__(self) -> None:
        self._young: set[bytes] = set()
        self._old = np.empty((0, 2), "<u8")  # sorted by the first column

    def has(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """For each, whether it is in."""
        found = self._in_old(digests)
        found |= np.fromiter((key in self._young for key in keys(digests)), bool, len(digests))
        return found

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Put them in; for each, whether it was new."""
        fresh = ~self._in_old(digests)
        for i, key in enumerate(keys(digests)):
            if fresh[i]:
                fresh[i] = key not in self._young
                self._young.add(key)
        if len(self._young) > YOUNG:
            self._settle()
        return fresh

    def _in_old(self, digests: Digests) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(digests), bool)
        at = np.searchsorted(self._old[:, 0], digests[:, 0])
        open_rows = np.flatnonzero(at < len(self._old))
        while open_rows.size:  # more than once only where first halves are equal
            candidates = self._old[at[open_rows]]
            equal = candidates == digests[open_rows]
            found[open_rows[equal.all(axis=1)]] = True
            at[open_rows] += 1
            open_rows = open_rows[equal[:, 0] & (at[open_rows] < len(self._old))]
        return found

    def _settle(self) -> None:
        young = np.frombuffer(b"".join(self._young), "<u8").reshape(-1, 2)
        both = np.concatenate([self._old, young])
        self._old = both[np.argsort(both[:, 0], kind="stable")]
        self._young = set()


def keys(digests: Digests) -> list[bytes]:
    data = digests.tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


@dataclasses.dataclass(frozen=True, slots=True)
class Sorted:
    """The stories to keep of a batch, by split, and the hashes to remember with them."""

    stories: dict[str, list[bytes]]
    digests: dict[str, Digests]
    dropped: Counter[str]  # by reason


class Sorter:
    """Gives each story its split and drops what is there already."""

    def __init__(self, *, keep_duplicates: bool, val_fraction: float) -> None:
        self.keep_duplicates = keep_duplicates
        self.val_fraction = val_fraction
        self.seen = {"train": Seen(), "val": Seen()}

    def sort(self, role: Role, stories: Sequence[bytes]) -> Sorted:
        """A validation source is kept as it is; no train story equals one of validation."""
        digests = digests_of(stories)
        result = Sorted({}, {}, Counter())
        if role == "both":
            val = held_out(digests, self.val_fraction)
            self._take(result, "val", stories, digests, val)
            self._take(result, "train", stories, digests, ~val)
        elif role == "val":
            result.stories["val"] = list(stories)
            result.digests["val"] = digests[self.seen["val"].add(digests)]
        else:
            known = self.seen["val"].has(digests)
            self._take(result, "train", stories, digests, ~known)
            result.dropped["also_in_val"] = int(known.sum())
        return result

    def _take(
        self, result: Sorted, split: str, stories: Sequence[bytes], digests: Digests, mine: npt.NDArray[np.bool_]
    ) -> None:
        """Put the stories marked as `mine` into the split, but for those it has already."""
        chosen = list(itertools.compress(stories, mine.tolist()))
        digests = digests[mine]
        if not self.keep_duplicates:
            fresh = self.seen[split].add(digests)
            result.dropped["duplicates"] += len(chosen) - int(fresh.sum())
            chosen, digests = list(itertools.compress(chosen, fresh.tolist())), digests[fresh]
        else:
            digests = digests[:0]  # nothing will be compared with them
        result.stories[split], result.digests[split] = chosen, digests
