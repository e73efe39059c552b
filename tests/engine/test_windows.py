from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories.config import ModelConfig
from tinystories.engine.protocol import Ids, validate_context, validate_ids, validate_sequences
from tinystories.engine.sliding_window import iter_windows, sliding_window_logprobs
from tinystories.errors import UserError

CONFIG = ModelConfig(vocab_size=50, n_ctx=8)


@given(st.integers(2, 200), st.integers(1, 40))
def test_every_id_counts_once_with_half_a_context_before_it(n_ids: int, n_ctx: int) -> None:
    counted = []
    for number, (start, stop, first) in enumerate(iter_windows(n_ids, n_ctx)):
        assert stop - start <= n_ctx + 1
        assert number == 0 or first - start >= max(1, n_ctx // 2)
        counted += range(first, stop)
    assert counted == list(range(1, n_ids))


def test_a_sequence_that_fits_is_one_window() -> None:
    assert list(iter_windows(9, 8)) == [(0, 9, 1)]
    assert list(iter_windows(10, 8)) == [(0, 9, 1), (4, 10, 9)]


class Tracer:
    """The "log-probability" of an id is minus how many ids the engine saw before it, in hundreds, minus the id."""

    config = CONFIG
    n_slots = 1

    def unused(self, *_: object) -> NoReturn:
        raise AssertionError("scoring needs no slots")

    prefill = step = free = unused

    def logprobs(self, sequences: list[Ids]) -> list[np.ndarray]:
        return [-100.0 * np.arange(1, len(ids)) - np.asarray(ids[1:]) for ids in sequences]


def test_scores_come_from_the_right_window_in_the_right_order() -> None:
    ids = list(range(20, 35))
    short = [3, 4]
    long_scores, short_scores = sliding_window_logprobs(Tracer(), [ids, short])
    seen = [*range(1, 9), *range(5, 9), *range(5, 7)]  # two windows of 9 ids, then one of the last 7
    assert long_scores.tolist() == [-100.0 * n - i for n, i in zip(seen, ids[1:], strict=True)]
    assert short_scores.tolist() == [-104.0]


def test_nothing_to_score_is_nothing() -> None:
    assert sliding_window_logprobs(Tracer(), []) == []


@pytest.mark.parametrize("ids", [[50], [-1], [3, 99, 4], [2**40]])
def test_ids_outside_the_vocabulary_are_refused_by_number(ids: list[int]) -> None:
    wrong = next(i for i in ids if not 0 <= i < 50)
    with pytest.raises(UserError, match=f"token id {wrong} .*50"):
        validate_ids(ids, 50)


def test_ids_of_small_types_are_widened() -> None:
    assert validate_ids(np.array([49], dtype=np.uint16), 50).dtype == np.int64


@pytest.mark.parametrize("size", [0, 9])
def test_a_context_of_the_wrong_size_is_refused(size: int) -> None:
    validate_context([1] * 8, CONFIG)
    with pytest.raises(UserError, match=f"{size} token ids"):
        validate_context([1] * size, CONFIG)


@pytest.mark.parametrize("size", [0, 1, 10])
def test_a_sequence_of_the_wrong_size_is_refused(size: int) -> None:
    validate_sequences([[1] * 2, [1] * 9], CONFIG)
    with pytest.raises(UserError, match=f"{size} token ids"):
        validate_sequences([[1, 2], [1] * size], CONFIG)
