"""Prefetched batches equal those built directly; the thread always ends, and loses no batch and no error."""

import contextlib
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.data.loader import PackedRows
from tinystories.train.distributed import SINGLE, World
from tinystories.train.prefetch import Batch, prefetch


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def rows(sample_data: Path) -> PackedRows:
    return PackedRows(sample_data, "train", 32, seed=3)


def numbered(step: int) -> Batch:
    return Batch(step, torch.full((2, 1, 1), step, dtype=torch.int32), step)


@settings(deadline=None, max_examples=10)
@given(first=st.integers(0, 5000), rank=st.integers(0, 1))
def test_batches_are_those_of_the_rows_from_any_step_on(rows: PackedRows, first: int, rank: int) -> None:
    """Also across the end of an epoch, where the order of the rows changes."""
    world, batch_size = World(rank, 2), max(2, rows.n_rows // 3 * 2)
    taken = list(prefetch(lambda step: Batch.from_rows(rows, step, batch_size, world), first, first + 6))
    assert [batch.step for batch in taken] == list(range(first, first + 6))
    for step, batch in enumerate(taken, first):
        inputs, targets = batch.to_device(torch.device("cpu"))
        expected = rows.get_batch(step, batch_size, rank, 2)
        assert inputs.dtype == targets.dtype == torch.int64
        np.testing.assert_array_equal(inputs.numpy(), expected[0])
        np.testing.assert_array_equal(targets.numpy(), expected[1])
        assert batch.n_targets == rows.count_targets(step, batch_size)


def test_targets_are_those_of_the_batch(rows: PackedRows) -> None:
    batch = Batch.from_rows(rows, 4, 8, SINGLE)
    assert batch.n_targets == int((batch.ids[1] >= 0).sum())


def test_one_batch_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    is_made = threading.Semaphore(0)

    def make(step: int) -> Batch:
        made.append(step)
        is_made.release()
        return numbered(step)

    with contextlib.closing(prefetch(make, 7, 20)) as batches:
        for step in range(7, 12):
            assert next(batches).step == step
            while step + 1 not in made:
                assert is_made.acquire(timeout=60), "the next batch is made without a call"
            assert made == list(range(7, step + 2))


def test_the_next_batch_is_made_while_the_caller_does_something_else() -> None:
    started = threading.Event()

    def make(step: int) -> Batch:
        if step == 1:
            started.set()
        return numbered(step)

    with contextlib.closing(prefetch(make, 0, 3)) as batches:
        next(batches)
        assert started.wait(60)


def test_nothing_is_made_beyond_the_last_step() -> None:
    made: list[int] = []
    batches = prefetch(lambda step: made.append(step) or numbered(step), 0, 3)
    assert [batch.step for batch in batches] == made == [0, 1, 2]
    assert list(prefetch(numbered, 5, 5)) == []


def test_an_error_in_the_thread_is_raised_for_its_step_with_its_traceback() -> None:
    def broken_disk(step: int) -> Batch:
        if step == 2:
            raise OSError("the disk is gone")
        return numbered(step)

    batches = prefetch(broken_disk, 0, 9)
    assert [next(batches).step for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as error:
        next(batches)
    assert "broken_disk" in "".join(traceback.format_tb(error.value.__traceback__))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_early_ends_the_thread_and_keeps_the_error(error: type[BaseException]) -> None:
    def slow(step: int) -> Batch:
        time.sleep(0.05)
        return numbered(step)

    with pytest.raises(error), contextlib.closing(prefetch(slow, 0, 1000)) as batches:  # noqa: PT012
        next(batches)
        raise error
