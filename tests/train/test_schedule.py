"""Learning-rate schedules: where they start, peak and end."""

import itertools

import pytest

from tinystories.config import ScheduleConfig
from tinystories.train.optimizer.learning_rate import get_learning_rate, get_momentum

STEPS, PEAK = 200, 2.0


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [get_learning_rate(step, STEPS, PEAK, schedule) for step in range(STEPS + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_rises_in_a_line_to_the_peak_then_never_rises(kind: str) -> None:
    all_rates = rates(kind=kind, warmup=0.1, decay=0.5, floor=0.1)
    assert all_rates[0] == pytest.approx(PEAK / 20)
    assert all_rates[19] == pytest.approx(PEAK)
    assert max(all_rates) == pytest.approx(PEAK)
    assert all(a >= b for a, b in itertools.pairwise(all_rates[19:]))
    assert all_rates[STEPS] == pytest.approx(0.1 * PEAK)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(kind="cosine", warmup=0.0, floor=0.0)[100] == pytest.approx(PEAK / 2)


def test_wsd_stays_at_the_peak_then_falls_in_a_line() -> None:
    all_rates = rates(kind="wsd", warmup=0.1, decay=0.25, floor=0.0)
    assert all_rates[20:151] == pytest.approx([PEAK] * 131)
    assert all_rates[175] == pytest.approx(PEAK / 2)


def test_no_warmup_starts_at_the_peak() -> None:
    assert rates(kind="cosine", warmup=0.0)[0] == PEAK


def test_momentum_rises_to_what_was_asked_for_and_stays() -> None:
    found = [get_momentum(step, STEPS, 0.95) for step in range(STEPS)]
    assert found[0] == 0.85
    assert found[60:] == pytest.approx([0.95] * (STEPS - 60))
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert get_momentum(0, STEPS, 0.5) == get_momentum(STEPS - 1, STEPS, 0.5) == 0.5
