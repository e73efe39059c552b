"""Progress of long work on stderr: bars if it is a terminal, log lines elsewhere."""

import logging
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


class Display:
    """A group of progress bars, used as a context manager. It has none if stderr is not a terminal, or with `quiet`."""

    def __init__(self, *columns: ProgressColumn, quiet: bool = False, **options: Any) -> None:
        """`options` are those of `rich.progress.Progress`."""
        console = Console(stderr=True)
        self.has_bar = console.is_terminal and not quiet
        self.progress = Progress(*columns, console=console, disable=not self.has_bar, **options)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the bars, or log it if there are none."""
        if self.has_bar:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)


class StepDisplay(Display):
    """Progress of a training run in steps, or of a sweep in trials. `step` is the number already done."""

    def __init__(self, steps: int, step: int, *, unit: str = "step", quiet: bool = False) -> None:
        text, eta = TextColumn("{task.fields[text]}"), (TextColumn("ETA"), TimeRemainingColumn())
        columns = (TextColumn(unit), MofNCompleteColumn(), BarColumn(bar_width=20), text, *eta)
        super().__init__(*columns, quiet=quiet, speed_estimate_period=120)
        self.steps, self.unit = steps, unit
        self.task_id = self.progress.add_task("train", total=steps, completed=step, text="")

    def update(self, step: int, text: str, *, log_line: bool) -> None:
        """Show the progress and `text`. Without a bar, log them if `log_line` is set."""
        self.progress.update(self.task_id, completed=step, text=text)
        if log_line and not self.has_bar:
            remaining = self.progress.tasks[0].time_remaining
            eta = f"  ETA {remaining / 60:.0f} min" if remaining is not None else ""
            log.info("%s %d/%d  %s%s", self.unit, step, self.steps, text, eta)


class ByteDisplay(Display):
    """Progress of a long read up to `total_bytes` (0: unknown). Without a bar it logs a line every few seconds."""

    def __init__(self, total_bytes: int, bytes_done: int, *, quiet: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        super().__init__(*columns, TimeRemainingColumn(), quiet=quiet, transient=True)
        self.total_bytes, self.bytes_done, self.initial_bytes = total_bytes, bytes_done, bytes_done
        self.started_at = self.logged_at = time.monotonic()
        self.task_id = self.progress.add_task("prepare", total=total_bytes or None, completed=bytes_done)

    def advance(self, n_bytes: int) -> None:
        """Add `n_bytes`; without a bar, log a line if LOG_INTERVAL_SECONDS have passed since the last."""
        self.bytes_done += n_bytes
        self.progress.advance(self.task_id, n_bytes)
        if not self.has_bar and time.monotonic() >= self.logged_at + LOG_INTERVAL_SECONDS:
            self.logged_at = time.monotonic()
            log.info(self.format_line())

    def format_line(self) -> str:
        """Return a line such as `120 of 500 MB, 85.3 MB/s, 4 s left`. The rate covers this run only."""
        rate = (self.bytes_done - self.initial_bytes) / max(time.monotonic() - self.started_at, 1e-9)
        if not self.total_bytes:
            return f"{self.bytes_done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        seconds_left = max(0, self.total_bytes - self.bytes_done) / max(rate, 1.0)
        done_text = f"{self.bytes_done / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB"
        return f"{done_text}, {rate / 1e6:.1f} MB/s, {seconds_left:.0f} s left"
