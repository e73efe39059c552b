"""Deduplication and split assignment: equivalent to a plain set for any order, batching and size."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories.data import dedup
from tinystories.data.dedup import Digests, HashSet, Role, SplitAssigner, hash_stories, is_held_out

FEW = st.lists(st.lists(st.sampled_from([f"story {n}".encode() for n in range(12)]), max_size=9), max_size=8)


def assign_all(assigner: SplitAssigner, role: Role, batches: Sequence[Sequence[bytes]]) -> dict[str, list[bytes]]:
    assigned: dict[str, list[bytes]] = {"train": [], "val": []}
    for batch in batches:
        for split, stories in assigner.assign(role, batch).stories.items():
            assigned[split] += stories
    return assigned


def digests_of(*rows: tuple[int, int]) -> Digests:
    return np.array(rows, "<u8").reshape(-1, 2)


@given(batches=FEW, max_unsorted=st.integers(0, 20))
def test_hash_set_is_a_set(batches: list[list[bytes]], max_unsorted: int) -> None:
    seen, plain = HashSet(), set[bytes]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "MAX_UNSORTED", max_unsorted)
        for batch in batches:
            digests = hash_stories(batch)
            assert seen.contains(digests).tolist() == [story in plain for story in batch]
            expected = []
            for story in batch:
                expected.append(story not in plain)
                plain.add(story)
            assert seen.add(digests).tolist() == expected


def test_hash_set_distinguishes_hashes_with_equal_first_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "MAX_UNSORTED", 0)  # merge into the sorted array at once
    seen = HashSet()
    seen.add(digests_of((7, 1), (7, 3), (7, 2), (9, 1), (2**64 - 1, 5)))
    asked = digests_of((7, 1), (7, 2), (7, 3), (7, 4), (9, 1), (9, 2), (1, 1), (8, 3), (2**64 - 1, 5), (2**64 - 1, 6))
    assert seen.contains(asked).tolist() == [True, True, True, False, True, False, False, False, True, False]


def test_hash_set_takes_16_bytes_for_all_but_the_latest() -> None:
    digests = np.random.default_rng(1).integers(0, 2**64, (400_000, 2), "<u8")
    seen = HashSet()
    for part in np.array_split(digests, 20):
        assert seen.add(part).all()
    assert not seen.add(digests[::1000]).any()
    assert seen._sorted.nbytes + 110 * len(seen._recent) < 400_000 * 16 + 110 * 2 * dedup.MAX_UNSORTED


@given(batches=FEW)
def test_without_a_validation_set_each_story_stands_once_on_one_side(batches: list[list[bytes]]) -> None:
    assigned = assign_all(SplitAssigner(keep_duplicates=False, val_fraction=0.3), "both", batches)
    everything = list(itertools.chain(*batches))
    assert sorted(assigned["train"] + assigned["val"]) == sorted(set(everything))
    # The first occurrence of each training story, in order.
    assert [s for s in dict.fromkeys(everything) if s in set(assigned["train"])] == assigned["train"]


@given(batches=FEW)
def test_kept_duplicates_still_stand_on_one_side(batches: list[list[bytes]]) -> None:
    assigned = assign_all(SplitAssigner(keep_duplicates=True, val_fraction=0.3), "both", batches)
    assert not set(assigned["train"]) & set(assigned["val"])
    assert sorted(assigned["train"] + assigned["val"]) == sorted(itertools.chain(*batches))


@pytest.mark.parametrize("keep_duplicates", [False, True])
@given(val=FEW, train=FEW)
def test_a_validation_set_is_kept_whole_and_taken_out_of_train(
    keep_duplicates: bool, val: list[list[bytes]], train: list[list[bytes]]
) -> None:
    assigner = SplitAssigner(keep_duplicates=keep_duplicates, val_fraction=0.3)
    assert assign_all(assigner, "val", val) == {"train": [], "val": list(itertools.chain(*val))}
    rest = [story for story in itertools.chain(*train) if story not in set(itertools.chain(*val))]
    expected = rest if keep_duplicates else list(dict.fromkeys(rest))
    assert assign_all(assigner, "train", train) == {"train": expected, "val": []}


def test_dropped_stories_are_counted() -> None:
    assigner = SplitAssigner(keep_duplicates=False, val_fraction=0.3)
    assigner.assign("val", [b"a", b"a"])
    dropped = assigner.assign("train", [b"a", b"b", b"b", b"b", b"c"]).dropped
    assert (dropped["also_in_val"], dropped["duplicates"]) == (1, 2)


def test_stored_hashes_restore_the_assigner() -> None:
    stories = [f"story {n % 50}".encode() for n in range(90)]
    first = SplitAssigner(keep_duplicates=False, val_fraction=0.3)
    result = first.assign("both", stories[:60])
    again = SplitAssigner(keep_duplicates=False, val_fraction=0.3)
    for split, digests in result.digests.items():
        again.hash_sets[split].add(digests)
    assert (
        again.assign("both", stories[60:]).stories
        == first.assign("both", stories[60:]).stories
        == {"train": [], "val": []}
    )


def test_held_out_fraction_is_as_requested() -> None:
    digests = hash_stories([f"story {n}".encode() for n in range(200_000)])
    assert is_held_out(digests, 0.005).mean() == pytest.approx(0.005, rel=0.1)
    assert not is_held_out(digests, 0.0).any()
    assert is_held_out(digests, 1.0).all()
    assert not (
        is_held_out(digests, 0.1) & ~is_held_out(digests, 0.2)
    ).any()  # a larger fraction includes the smaller one
