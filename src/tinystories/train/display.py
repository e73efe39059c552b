"""The live line of a training run, and those of a sweep: a progress bar on a terminal, plain lines elsewhere."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class Display:
    """`with Display(steps, at) as display: display.update(step, text)`; a bar where stderr is a terminal.

    `quiet` shows nothing: of several processes one talks.
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
        """Show the newest figures; where there is no terminal, print them if `line`."""
        self.progress.update(self.task_id, completed=step, text=text)
        if log_line and not self.console.is_terminal:
            remaining = self.progress.tasks[0].time_remaining
            eta = f"  ETA {remaining / 60:.0f} min" if remaining is not None else ""
            log.info("step %d/%d  %s%s", step, self.steps, text, eta)

    def print_line(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)


class SweepDisplay:
    """A bar for the trials of a sweep and one for each that is under way; plain lines where there is no terminal."""

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
        self.task_ids[number] = self.progress.add_task(f"trial {number}, step", total=steps, text="")

    def update_trial(self, number: int, step: int, text: str) -> None:
        self.progress.update(self.task_ids[number], completed=step, text=text)

    def remove_trial(self, number: int) -> None:
        if number in self.task_ids:
            self.progress.remove_task(self.task_ids.pop(number))

    def update_finished(self, n_finished: int, text: str) -> None:
        """Show how many trials have finished, and the best of them."""
        self.progress.update(self.overall_task_id, completed=n_finished, text=text)

    def print_line(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)
