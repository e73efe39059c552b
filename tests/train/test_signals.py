"""Signals are handled inside the block, and can be ignored after an error so that its message is not cut off."""

import os
import signal

import pytest

from tinystories.train.signals import handle_signals


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> signal.Signals:
    return request.param


def test_signals_call_the_handler_and_are_then_restored(number: signal.Signals) -> None:
    asked: list[int] = []
    before = signal.getsignal(number)
    with handle_signals(asked.append):
        os.kill(os.getpid(), number)
    assert asked == [number]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("deaf", [False, True])
def test_signals_are_ignored_after_an_error_where_asked(number: signal.Signals, deaf: bool) -> None:
    before = signal.getsignal(number)
    try:
        with pytest.raises(ValueError, match="lost"), handle_signals(lambda _: None, ignore_after_error=deaf):
            raise ValueError("lost")
        assert signal.getsignal(number) == (signal.SIG_IGN if deaf else before)
    finally:
        signal.signal(number, before)
