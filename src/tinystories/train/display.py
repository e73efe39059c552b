"""Live progress of a sweep: progress bars on a terminal, log lines elsewhere."""

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

log = logging.getLogger(__name__)


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
