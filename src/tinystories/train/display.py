"""The live line of a training run: a progress bar on a terminal, plain lines elsewhere."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
