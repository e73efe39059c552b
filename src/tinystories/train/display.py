"""Live progress of a training run or a sweep: progress bars on a terminal, log lines elsewhere."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class Display:
    """Progress of one run: a bar if stderr is a terminal, otherwise log lines. Use it as a context manager.

    `step` is the number of steps already done. `quiet` shows no bar (ranks other than 0).
    """

    def __init__(self, steps: int, step: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.steps = steps
        self.progress = Progress(
            TextColumn("step"),
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
            log.info("step %d/%d  %s%s", step, self.steps, text, eta)

    def print_line(self, text: str) -> None:
        """Print a line above the bar, or log it if there is no terminal."""
        if self.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)


class SweepDisplay:
    """Progress of a sweep: a bar for all trials and one for each running trial; log lines if there is no terminal."""

    def __init__(self, n_trials: int, n_finished: int) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.overall_task_id = self.progress.add_task("trials", total=n_trials, completed=n_finished, text="")
        self.task_ids: dict[int, TaskID] = {}

    def __enter__(self) -> "SweepDisplay":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def start_trial(self, number: int, steps: int) -> None:
        """Add a bar for a trial of `steps` steps."""
        self.task_ids[number] = self.progress.add_task(f"trial {number}, step", total=steps, text="")

    def update_trial(self, number: int, step: int, text: str) -> None:
        self.progress.update(self.task_ids[number], completed=step, text=text)

    def remove_trial(self, number: int) -> None:
        if number in self.task_ids:
            self.progress.remove_task(self.task_ids.pop(number))

    def update_finished(self, n_finished: int, text: str) -> None:
        """Show how many trials have finished, with `text` about the best one."""
        self.progress.update(self.overall_task_id, completed=n_finished, text=text)

    def print_line(self, text: str) -> None:
        """Print a line above the bars, or log it if there is no terminal."""
        if self.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)
