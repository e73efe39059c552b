"""Progress of a long read on stderr: a bar with MB/s and time left, or a plain line now and then."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0


class Meter:
    """Counts bytes up to `total` (0: not known); made by `meter`."""

    def __init__(self, total: int, done: int, bar: Progress | None) -> None:
        self.total, self.done, self.bar = total, done, bar
        self._began, self._first, self._line = time.monotonic(), done, time.monotonic()
        self._task = bar.add_task("prepare", total=total or None, completed=done) if bar else None

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is not None and self._task is not None:
            self.bar.advance(self._task, count)
        elif time.monotonic() >= self._line + LINE_SECONDS:
            self._line = time.monotonic()
            log.info(self.line())

    def line(self) -> str:
        """Such as `120 of 500 MB, 85.3 MB/s, 4 s left`."""
        rate = (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)
        if not self.total:
            return f"{self.done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        left = max(0, self.total - self.done) / max(rate, 1.0)
        return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"


@contextmanager
def meter(total: int, done: int, *, show: bool) -> Iterator[Meter]:
    """A meter whose bar, if stderr is a terminal and `show`, lives as long as the context."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield Meter(total, done, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield Meter(total, done, bar)
