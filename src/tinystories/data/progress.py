"""Report the progress of a long read on stderr: a bar with MB/s and time left, or a log line every few seconds."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


class ProgressMeter:
    """Counts bytes up to `total_bytes` (0: unknown) and displays them; create it with `track_progress`."""

    def __init__(self, total_bytes: int, bytes_done: int, bar: Progress | None) -> None:
        self.total_bytes, self.bytes_done, self.bar = total_bytes, bytes_done, bar
        self._started_at, self._initial_bytes, self._logged_at = time.monotonic(), bytes_done, time.monotonic()
        self._task_id = bar.add_task("prepare", total=total_bytes or None, completed=bytes_done) if bar else None

    def advance(self, n_bytes: int) -> None:
        """Add `n_bytes`; update the bar, or log a line if LOG_INTERVAL_SECONDS have passed since the last."""
        self.bytes_done += n_bytes
        if self.bar is not None and self._task_id is not None:
            self.bar.advance(self._task_id, n_bytes)
        elif time.monotonic() >= self._logged_at + LOG_INTERVAL_SECONDS:
            self._logged_at = time.monotonic()
            log.info(self.format_line())

    def format_line(self) -> str:
        """Return a line such as `120 of 500 MB, 85.3 MB/s, 4 s left`. The rate covers this run only."""
        rate = (self.bytes_done - self._initial_bytes) / max(time.monotonic() - self._started_at, 1e-9)
        if not self.total_bytes:
            return f"{self.bytes_done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        seconds_left = max(0, self.total_bytes - self.bytes_done) / max(rate, 1.0)
        done_text = f"{self.bytes_done / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB"
        return f"{done_text}, {rate / 1e6:.1f} MB/s, {seconds_left:.0f} s left"


@contextmanager
def track_progress(total_bytes: int, bytes_done: int, *, show: bool) -> Iterator[ProgressMeter]:
    """Yield a meter. It shows a bar inside the block if `show` is set and stderr is a terminal, else it logs lines."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield ProgressMeter(total_bytes, bytes_done, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield ProgressMeter(total_bytes, bytes_done, bar)
