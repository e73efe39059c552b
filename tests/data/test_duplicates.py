"""Splits and duplicates: like a plain set, whatever the order, the batches and the size."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories.data import dedup
from tinystories.data.dedup import Digests, HashSet, Role, SplitAssigner, hash_stories, is_held_out

FEW = st.lists(st.lists(st.sampled_from([f"story {n}".encode() for n in range(12)]), max_size=9), max_size=8)


def sort_all(sorter: SplitAssigner, role: Role, batches: Sequence[Sequence[bytes]]) -> dict[str, list[bytes]]:
    kept: dict[str, list[bytes]] = {"train": [], "val": []}
    for batch in batches:
        for split, stories in sorter.assign(role, batch).stories.items():
            kept[split] += stories
    return kept


def made_up(*rows: tuple[int, int]) -> Digests:
    return np.array(rows, "<u8").reshape(-1, 2)


@given(batches=FEW, young=st.integers(0, 20))
def test_seen_is_a_set(batches: list[list[bytes]], young: int) -> None:
    seen, plain = HashSet(), set[bytes]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "MAX_UNSORTED", young)
        for batch in batches:
            digests = hash_stories(batch)
            assert seen.contains(digests).tolist() == [story in plain for story in batch]
            expected = []
            for story in batch:
                expected.append(story not in plain)
                plain.add(story)
            assert seen.add(digests).tolist() == expected


def test_seen_tells_hashes_with_equal_first_halves_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "MAX_UNSORTED", 0)  # into the arrays at once
    seen = HashSet()
    seen.add(made_up((7, 1), (7, 3), (7, 2), (9, 1), (2**64 - 1, 5)))
    asked = made_up((7, 1), (7, 2), (7, 3), (7, 4), (9, 1), (9, 2), (1, 1), (8, 3), (2**64 - 1, 5), (2**64 - 1, 6))
    assert seen.contains(asked).tolist() == [True, True, True, False, True, False, False, False, True, False]


def test_seen_takes_16_bytes_for_all_but_the_latest() -> None:
    digests = np.random.default_rng(1).integers(0, 2**64, (400_000, 2), "<u8")
    seen = HashSet()
    for part in np.array_split(digests, 20):
        assert seen.add(part).all()
    assert not seen.add(digests[::1000]).any()
    assert seen._sorted.nbytes + 110 * len(seen._recent) < 400_000 * 16 + 110 * 2 * dedup.MAX_UNSORTED


@given(batches=FEW)
def test_without_a_validation_set_each_story_stands_once_on_one_side(batches: list[list[bytes]]) -> None:
    kept = sort_all(SplitAssigner(keep_duplicates=False, val_fraction=0.3), "both", batches)
    everything = list(itertools.chain(*batches))
    assert sorted(kept["train"] + kept["val"]) == sorted(set(everything))
    assert [s for s in dict.fromkeys(everything) if s in set(kept["train"])] == kept["train"]  # first place, in order


@given(batches=FEW)
def test_kept_duplicates_still_stand_on_one_side(batches: list[list[bytes]]) -> None:
    kept = sort_all(SplitAssigner(keep_duplicates=True, val_fraction=0.3), "both", batches)
    assert not set(kept["train"]) & set(kept["val"])
    assert sorted(kept["train"] + kept["val"]) == sorted(itertools.chain(*batches))


@pytest.mark.parametrize("keep_duplicates", [False, True])
@given(val=FEW, train=FEW)
def test_a_validation_set_is_kept_whole_and_taken_out_of_train(
    keep_duplicates: bool, val: list[list[bytes]], train: list[list[bytes]]
) -> None:
    sorter = SplitAssigner(keep_duplicates=keep_duplicates, val_fraction=0.3)
    assert sort_all(sorter, "val", val) == {"train": [], "val": list(itertools.chain(*val))}
    rest = [story for story in itertools.chain(*train) if story not in set(itertools.chain(*val))]
    expected = rest if keep_duplicates else list(dict.fromkeys(rest))
    assert sort_all(sorter, "train", train) == {"train": expected, "val": []}


def test_what_is_dropped_is_counted() -> None:
    sorter = SplitAssigner(keep_duplicates=False, val_fraction=0.3)
    sorter.assign("val", [b"a", b"a"])
    dropped = sorter.assign("train", [b"a", b"b", b"b", b"b", b"c"]).dropped
    assert (dropped["also_in_val"], dropped["duplicates"]) == (1, 2)


def test_remembered_hashes_bring_back_the_sorter() -> None:
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


def test_the_held_out_share_is_as_asked() -> None:
    digests = hash_stories([f"story {n}".encode() for n in range(200_000)])
    assert is_held_out(digests, 0.005).mean() == pytest.approx(0.005, rel=0.1)
    assert not is_held_out(digests, 0.0).any()
    assert is_held_out(digests, 1.0).all()
    assert not (is_held_out(digests, 0.1) & ~is_held_out(digests, 0.2)).any()  # a larger share holds the smaller one
