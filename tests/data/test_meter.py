"""Progress: plain lines now and then, a bar on terminals only."""

import logging

import pytest

from tinystories.data import progress as module
from tinystories.data.progress import ProgressMeter, track_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_rate_and_time_left(clock: list[float]) -> None:
    shown = ProgressMeter(500_000_000, 100_000_000, None)  # going on: the rate counts what this run reads
    clock[0] += 2
    shown.advance(100_000_000)
    assert shown.format_line() == "200 of 500 MB, 50.0 MB/s, 6 s left"


def test_without_a_total_no_time_is_promised(clock: list[float]) -> None:
    shown = ProgressMeter(0, 0, None)
    clock[0] += 1
    shown.advance(3_000_000)
    assert shown.format_line() == "3 MB, 3.0 MB/s"


def test_lines_come_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with track_progress(1000, 0, show=True) as shown:  # under pytest stderr is no terminal
        for _ in range(100):
            clock[0] += 0.3
            shown.advance(10)
    assert 3 <= len(caplog.records) <= 30 / module.LOG_INTERVAL_SECONDS


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with track_progress(2_000_000, 0, show=True) as shown:
        shown.advance(1_000_000)
        assert shown.bar is not None
        shown.bar.refresh()
    captured = capsys.readouterr()
    assert "1.0/2.0 MB" in captured.err
    assert captured.out == ""


def test_silence_when_not_wanted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with track_progress(2_000_000, 0, show=False) as shown:
        shown.advance(1_000_000)
    assert capsys.readouterr().err == ""
