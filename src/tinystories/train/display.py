"""Live progress of a training run or a sweep: a progress bar on a terminal, log lines elsewhere."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class Display:
    """Progress in steps, or another unit: a bar if stderr is a terminal, otherwise log lines; a context manager.

    `step` is the number of steps already done. `quiet` shows no bar (ranks other than 0).
    """

    def __init__(self, steps: int, step: int, *, unit: str = "step", quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.steps, self.unit = steps, unit
        self.progress = Progress(
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=120,
        )
        self.task_id = self.progress.add_task("train", total=steps, completed=step, text="")

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, step: int, text: str, *, log_line: bool) -> None:
        """Show the progress and `text`. Without a terminal, log them if `log_line` is set."""
        self.progress.update(self.task_id, completed=step, text=text)
        if log_line and not self.console.is_terminal:
            remaining = self.progress.tasks[0].time_remaining
            eta = f"  ETA {remaining / 60:.0f} min" if remaining is not None else ""
            log.info("%s %d/%d  %s%s", self.unit, step, self.steps, text, eta)

    def print_line(self, text: str) -> None:
        """Print a line above the bar, or log it if there is no terminal."""
        if self.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)
