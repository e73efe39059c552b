"""Progress display: periodic log lines, and a bar only on terminals."""

import logging

import pytest

from tinystories import progress
from tinystories.progress import ByteDisplay


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_rate_and_time_left(clock: list[float]) -> None:
    meter = ByteDisplay(500_000_000, 100_000_000)  # resumed: the rate counts only what this run reads
    clock[0] += 2
    meter.advance(100_000_000)
    assert meter.format_line() == "200 of 500 MB, 50.0 MB/s, 6 s left"


def test_a_line_without_a_total_promises_no_time(clock: list[float]) -> None:
    meter = ByteDisplay(0, 0)
    clock[0] += 1
    meter.advance(3_000_000)
    assert meter.format_line() == "3 MB, 3.0 MB/s"


def test_log_lines_come_every_few_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ByteDisplay(1000, 0) as meter:  # under pytest, stderr is not a terminal
        for _ in range(100):
            clock[0] += 0.3
            meter.advance(10)
    assert 3 <= len(caplog.records) <= 30 / progress.LOG_INTERVAL_SECONDS


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with ByteDisplay(2_000_000, 0) as meter:
        meter.advance(1_000_000)
        meter.progress.refresh()
    captured = capsys.readouterr()
    assert "1.0/2.0 MB" in captured.err
    assert captured.out == ""


def test_a_quiet_display_shows_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ByteDisplay(2_000_000, 0, quiet=True) as meter:
        meter.advance(1_000_000)
    assert capsys.readouterr().err == ""
