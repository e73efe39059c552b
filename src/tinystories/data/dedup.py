"""Deduplicate stories and assign them to the training or validation split, both by a 128-bit hash of the text."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

Role = Literal["train", "val", "both"]  # what a source is used for; "both": part of it is held out for validation
Digests = npt.NDArray[np.uint64]  # shape (N, 2): one 128-bit hash per story

MAX_UNSORTED = 1 << 17  # hashes kept in the Python set before they are merged into the sorted array


def hash_stories(stories: Sequence[bytes]) -> Digests:
    """Return the XXH3-128 hash of each story, shape (N, 2). Among 10^9 stories, P(any collision) is about 10^-21."""
    return np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, stories)), "<u8").reshape(-1, 2)


def is_held_out(digests: Digests, fraction: float) -> npt.NDArray[np.bool_]:
    """Return a mask of the stories held out for validation. Depends only on each story's own text, never on order."""
    # The upper 32 bits of the first word are uniform in [0, 2^32).
    mask: npt.NDArray[np.bool_] = digests[:, 0] >> np.uint64(32) < int(fraction * 2**32)
    return mask


class HashSet:
    """A growing set of hashes, used to deduplicate: a sorted array, plus a Python set for the most recent ones.

    The array takes 16 bytes per story. A Python set alone would take about 110, or 300 MB for all of TinyStories.
    """

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._sorted = np.empty((0, 2), "<u8")  # sorted by the first column

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Return a mask of the hashes that are in the set."""
        is_member = self._is_in_sorted(digests)
        is_member |= np.fromiter((key in self._recent for key in to_keys(digests)), bool, len(digests))
        return is_member

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Add the hashes; return a mask of those that were not in the set before (nor earlier in `digests`)."""
        is_new = ~self._is_in_sorted(digests)
        for i, key in enumerate(to_keys(digests)):
            if is_new[i]:
                is_new[i] = key not in self._recent
                self._recent.add(key)
        if len(self._recent) > MAX_UNSORTED:
            self._compact()
        return is_new

    def _is_in_sorted(self, digests: Digests) -> npt.NDArray[np.bool_]:
        # Binary search by the first 64 bits, then step through the entries that share them until the second half
        # matches too.
        is_member = np.zeros(len(digests), bool)
        positions = np.searchsorted(self._sorted[:, 0], digests[:, 0])
        unresolved = np.flatnonzero(positions < len(self._sorted))
        while unresolved.size:  # a second pass only if two hashes share their first half
            candidates = self._sorted[positions[unresolved]]
            equal = candidates == digests[unresolved]
            is_member[unresolved[equal.all(axis=1)]] = True
            positions[unresolved] += 1
            unresolved = unresolved[equal[:, 0] & (positions[unresolved] < len(self._sorted))]
        return is_member

    def _compact(self) -> None:
        """Merge the recent hashes into the sorted array."""
        recent = np.frombuffer(b"".join(self._recent), "<u8").reshape(-1, 2)
        merged = np.concatenate([self._sorted, recent])
        self._sorted = merged[np.argsort(merged[:, 0], kind="stable")]
        self._recent = set()


def to_keys(digests: Digests) -> list[bytes]:
    """Return each 128-bit hash as 16 bytes."""
    data = digests.tobytes()
    return [data[i : i + 16] for i in range(0, len(data), 16)]


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """The stories of a batch to write to each split, and their hashes to store for later deduplication."""

    stories: dict[str, list[bytes]]
    digests: dict[str, Digests]
    dropped: Counter[str]  # number of stories dropped, by reason


class SplitAssigner:
    """Assigns each story to a split and drops duplicates."""

    def __init__(self, *, keep_duplicates: bool, val_fraction: float) -> None:
        self.keep_duplicates = keep_duplicates
        self.val_fraction = val_fraction
        self.hash_sets = {"train": HashSet(), "val": HashSet()}

    def assign(self, role: Role, stories: Sequence[bytes]) -> Assignment:
        """Split and deduplicate one batch of a source with the given role.

        A validation source is kept unchanged, duplicates included. Training stories that are also in the validation set
        are always dropped, so the validation sources must be assigned first.
        """
        digests = hash_stories(stories)
        assignment = Assignment({}, {}, Counter())
        if role == "both":
            is_val = is_held_out(digests, self.val_fraction)
            masks = {"val": is_val, "train": ~is_val}
        elif role == "val":
            masks = {"val": np.ones(len(stories), bool)}
        else:
            in_val = self.hash_sets["val"].contains(digests)
            masks = {"train": ~in_val}
            assignment.dropped["also_in_val"] = int(in_val.sum())
        for split, mask in masks.items():
            selected, hashes = list(itertools.compress(stories, mask.tolist())), digests[mask]
            if self.keep_duplicates and role != "val":
                hashes = hashes[:0]  # nothing will be compared against them
            else:
                is_new = self.hash_sets[split].add(hashes)
                hashes = hashes[is_new]
                if role != "val":
                    assignment.dropped["duplicates"] += len(selected) - len(hashes)
                    selected = list(itertools.compress(selected, is_new.tolist()))
            assignment.stories[split], assignment.digests[split] = selected, hashes
        return assignment
