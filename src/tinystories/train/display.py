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
        self.bar = Progress(
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
        self.task = self.bar.add_task("train", total=steps, completed=step, text="")

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: int, text: str, *, line: bool) -> None:
        """Show the newest figures; where there is no terminal, print them if `line`."""
        self.bar.update(self.task, completed=step, text=text)
        if line and not self.console.is_terminal:
            remaining = self.bar.tasks[0].time_remaining
            eta = f"  ETA {remaining / 60:.0f} min" if remaining is not None else ""
            log.info("step %d/%d  %s%s", step, self.steps, text, eta)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.console.is_terminal:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)


class SweepDisplay:
    """A bar for the trials of a sweep and one for each that is under way; plain lines where there is no terminal."""

    def __init__(self, trials: int, finished: int) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.all = self.bar.add_task("trials", total=trials, completed=finished, text="")
        self.tasks: dict[int, TaskID] = {}

    def __enter__(self) -> "SweepDisplay":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, number: int, steps: int) -> None:
        self.tasks[number] = self.bar.add_task(f"trial {number}, step", total=steps, text="")

    def update(self, number: int, step: int, text: str) -> None:
        self.bar.update(self.tasks[number], completed=step, text=text)

    def end(self, number: int) -> None:
        if number in self.tasks:
            self.bar.remove_task(self.tasks.pop(number))

    def finished(self, trials: int, text: str) -> None:
        """Show how many trials have finished, and the best of them."""
        self.bar.update(self.all, completed=trials, text=text)

    def say(self, text: str) -> None:
        """A line of its own, above the bars."""
        if self.console.is_terminal:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            log.info(text)
