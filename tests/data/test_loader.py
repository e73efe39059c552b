"""Packing and batches: no token is lost or invented, and the result is the same for any number of ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.data.dataset import open_split
from tinystories.data.loader import IGNORE_INDEX, MIN_HEAD_TOKENS, PackedRows, pack_rows
from tinystories.errors import UserError

lengths_lists = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def coverage(lengths: list[int], n_ctx: int) -> tuple[npt.NDArray[np.int64], list[list[tuple[int, int, int]]]]:
    """Return how often each position of each story is a target, and the rows as (story, offset, size)."""
    starts, pieces = pack_rows(np.array(sorted(lengths), dtype=np.int64), n_ctx)
    rows = [[tuple(piece) for piece in pieces[i:j].tolist()] for i, j in itertools.pairwise(starts)]
    counts = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row in rows:
        for s, o, n in row:
            counts[s, o : o + n] += 1
    return counts, rows


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(2, 64))
def test_every_token_is_a_target_and_rows_are_full(lengths: list[int], n_ctx: int) -> None:
    counts, rows = coverage(lengths, n_ctx)
    for story, length in enumerate(sorted(lengths)):
        assert counts[story, :length].min() >= 1
        assert counts[story, length:].sum() == 0
    for row in rows:
        assert 1 <= sum(size for _, _, size in row) <= n_ctx


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(2, 64))
def test_each_story_that_fits_stands_whole_in_one_row(lengths: list[int], n_ctx: int) -> None:
    _, rows = coverage(lengths, n_ctx)
    whole = sorted(s for row in rows for s, o, n in row if o == 0 and n == sorted(lengths)[s])
    assert whole == [s for s, length in enumerate(sorted(lengths)) if length <= n_ctx]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=80))
def test_rows_begin_with_a_story_where_no_story_is_longer_than_the_context(lengths: list[int]) -> None:
    _, rows = coverage(lengths, 32)
    assert all(row[0][1] == 0 for row in rows)


def test_room_is_filled_by_heads_of_stories() -> None:
    _, rows = coverage([20] * 50, 32)
    filled = [sum(size for _, _, size in row) for row in rows]
    assert filled == [32] * 50
    assert MIN_HEAD_TOKENS <= 32 - 20


@pytest.fixture
def rows(sample_data: Path) -> PackedRows:
    return PackedRows(sample_data, "train", 64, seed=5)


def test_windows_are_the_stories_shifted_by_one(rows: PackedRows, sample_data: Path) -> None:
    tokens, index = open_split(sample_data, "train")
    stories = [tokens[int(a) : int(b) + 1].tolist() for a, b in zip(index[:-1, 0], index[1:, 0], strict=True)]
    pairs = {pair for story in stories for pair in itertools.pairwise(story)}
    inputs, targets = rows.get_rows(np.arange(40))
    for x, y in zip(inputs, targets, strict=True):
        counted = y != IGNORE_INDEX
        assert set(zip(x[counted].tolist(), y[counted].tolist(), strict=True)) <= pairs
        assert (x[~counted] == rows.end_id).all()


def test_an_epoch_holds_every_story_once_and_no_window_twice(rows: PackedRows, sample_data: Path) -> None:
    tokens, index = open_split(sample_data, "train")
    inputs, targets = rows.get_rows(np.arange(rows.n_rows))
    assert len({row.tobytes() for row in targets}) == rows.n_rows
    assert (targets == rows.end_id).sum() >= len(index) - 1  # the closing END of each
    trained = np.bincount(targets[targets != IGNORE_INDEX], minlength=400)
    assert (trained >= np.bincount(tokens[1:], minlength=400)).all()
    assert inputs.shape == targets.shape == (rows.n_rows, 64)


def test_a_batch_is_a_pure_function_of_seed_and_step(rows: PackedRows, sample_data: Path) -> None:
    again = PackedRows(sample_data, "train", 64, seed=5)
    far = rows.get_batch(1000, 8)
    rows.get_batch(3, 8)
    for a, b in zip(again.get_batch(1000, 8), far, strict=True):
        np.testing.assert_array_equal(a, b)
    other = PackedRows(sample_data, "train", 64, seed=6).get_batch(1000, 8)
    assert not np.array_equal(other[0], far[0])


def test_one_rank_of_eight_rows_equals_two_ranks_of_four(rows: PackedRows) -> None:
    for step in (0, 7, rows.n_rows // 8, 400):
        inputs, targets = rows.get_batch(step, 8)
        for rank in range(2):
            mine = np.arange(step * 8 + rank * 4, step * 8 + rank * 4 + 4)
            x, y = rows.get_rows(mine)
            np.testing.assert_array_equal(x, inputs[rank * 4 : rank * 4 + 4])
            np.testing.assert_array_equal(y, targets[rank * 4 : rank * 4 + 4])


def test_epochs_shuffle_rows_and_neighbours(rows: PackedRows) -> None:
    first = rows.get_rows(np.arange(rows.n_rows))[1]
    second = rows.get_rows(np.arange(rows.n_rows, 2 * rows.n_rows))[1]
    assert {row.tobytes() for row in first} != {row.tobytes() for row in second}


def test_a_story_longer_than_the_context_is_trained_on_in_pieces(sample_data: Path) -> None:
    tokens, index = open_split(sample_data, "train")
    assert np.diff(index[:, 0].astype(np.int64)).min() > 16
    rows = PackedRows(sample_data, "train", 16, seed=0)
    _, targets = rows.get_rows(np.arange(rows.n_rows))
    counted = targets[targets != IGNORE_INDEX]
    np.testing.assert_array_equal(
        np.bincount(counted, minlength=400) >= np.bincount(tokens[1:], minlength=400), np.full(400, True)
    )


def test_a_truncated_token_file_is_refused(sample_data: Path, tmp_path: Path) -> None:
    for path in sample_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"train\.bin"):
        PackedRows(tmp_path, "train", 64, seed=0)


def test_a_split_without_stories_is_refused(sample_data: Path, tmp_path: Path) -> None:
    for path in sample_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["splits"]["val"] |= {"stories": 0, "tokens": 1, "bytes": 0}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes()[:2])
    (tmp_path / "val.idx").write_bytes(np.zeros((1, 2), dtype="<u8").tobytes())
    with pytest.raises(UserError, match="contains no stories"):
        PackedRows(tmp_path, "val", 64, seed=0)
