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

MAX_UNSORTED = 1 << 17  # hashes in the Python set before they move to the sorted arrays


def hash_stories(stories: Sequence[bytes]) -> Digests:
    """XXH3-128 of each story: equal for equal text; two others among 10^9 meet with a chance of 10^-21."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, stories)), "<u8").reshape(-1, 2)


def is_held_out(digests: Digests, fraction: float) -> npt.NDArray[np.bool_]:
    """Which stories belong to validation; depends on their text alone, not on order or neighbours."""
    mask: npt.NDArray[np.bool_] = digests[:, 0] >> np.uint64(32) < int(fraction * 2**32)
    return mask


class HashSet:
    """A growing set of hashes: sorted arrays for the many, a Python set for the latest.

    A Python set alone takes some 110 bytes per story, 300 MB for the whole of TinyStories.
    """

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._sorted = np.empty((0, 2), "<u8")  # sorted by the first column

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """For each, whether it is in."""
        is_member = self._is_in_sorted(digests)
        is_member |= np.fromiter((key in self._recent for key in to_keys(digests)), bool, len(digests))
        return is_member

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Put them in; for each, whether it was new."""
        is_new = ~self._is_in_sorted(digests)
        for i, key in enumerate(to_keys(digests)):
            if is_new[i]:
                is_new[i] = key not in self._recent
                self._recent.add(key)
        if len(self._recent) > MAX_UNSORTED:
            self._compact()
        return is_new

    def _is_in_sorted(self, digests: Digests) -> npt.NDArray[np.bool_]:
        is_member = np.zeros(len(digests), bool)
        positions = np.searchsorted(self._sorted[:, 0], digests[:, 0])
        unresolved = np.flatnonzero(positions < len(self._sorted))
        while unresolved.size:  # more than once only where first halves are equal
            candidates = self._sorted[positions[unresolved]]
            equal = candidates == digests[unresolved]
            is_member[unresolved[equal.all(axis=1)]] = True
            positions[unresolved] += 1
            unresolved = unresolved[equal[:, 0] & (positions[unresolved] < len(self._sorted))]
        return is_member

    def _compact(self) -> None:
        recent = np.frombuffer(b"".join(self._recent), "<u8").reshape(-1, 2)
        merged = np.concatenate([self._sorted, recent])
        self._sorted = merged[np.argsort(merged[:, 0], kind="stable")]
        self._recent = set()


def to_keys(digests: Digests) -> list[bytes]:
    data = digests.tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """The stories to keep of a batch, by split, and the hashes to remember with them."""

    stories: dict[str, list[bytes]]
    digests: dict[str, Digests]
    dropped: Counter[str]  # by reason


class SplitAssigner:
    """Gives each story its split and drops what is there already."""

    def __init__(self, *, keep_duplicates: bool, val_fraction: float) -> None:
        self.keep_duplicates = keep_duplicates
        self.val_fraction = val_fraction
        self.hash_sets = {"train": HashSet(), "val": HashSet()}

    def assign(self, role: Role, stories: Sequence[bytes]) -> Assignment:
        """A validation source is kept as it is; no train story equals one of validation."""
        digests = hash_stories(stories)
        assignment = Assignment({}, {}, Counter())
        if role == "both":
            is_val = is_held_out(digests, self.val_fraction)
            self._add_to_split(assignment, "val", stories, digests, is_val)
            self._add_to_split(assignment, "train", stories, digests, ~is_val)
        elif role == "val":
            assignment.stories["val"] = list(stories)
            assignment.digests["val"] = digests[self.hash_sets["val"].add(digests)]
        else:
            in_val = self.hash_sets["val"].contains(digests)
            self._add_to_split(assignment, "train", stories, digests, ~in_val)
            assignment.dropped["also_in_val"] = int(in_val.sum())
        return assignment

    def _add_to_split(
        self,
        assignment: Assignment,
        split: str,
        stories: Sequence[bytes],
        digests: Digests,
        in_split: npt.NDArray[np.bool_],
    ) -> None:
        """Put the stories marked as `mine` into the split, but for those it has already."""
        selected = list(itertools.compress(stories, in_split.tolist()))
        digests = digests[in_split]
        if not self.keep_duplicates:
            is_new = self.hash_sets[split].add(digests)
            assignment.dropped["duplicates"] += len(selected) - int(is_new.sum())
            selected, digests = list(itertools.compress(selected, is_new.tolist())), digests[is_new]
        else:
            digests = digests[:0]  # nothing will be compared with them
        assignment.stories[split], assignment.digests[split] = selected, digests
