"""The search loop: ask Optuna for settings, train each trial in its own process, and report the result to Optuna.

The ask-and-tell interface is used instead of `study.optimize` because trials are processes that can be pruned while
they run, stopped by a signal, and resumed by a later session from their own checkpoints.
"""

import dataclasses
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.config import Config
from tinystories.data.dataset import open_split
from tinystories.errors import UserError
from tinystories.sweep.results import TrialResult, find_best, format_setting, plot_results, read_results, write_results
from tinystories.sweep.study import Plan, exclusive_lock, make_pruner, make_sampler, open_study
from tinystories.sweep.trial import (
    Outcome,
    TrialProcess,
    prepare_dir,
    read_outcome,
    read_records,
    stop_orphans,
    trial_dir,
)
from tinystories.train import signals
from tinystories.train.display import SweepDisplay

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.1  # seconds between two checks of the running trials
# Minimum seconds between two updates of sweep.png; drawing takes most of a second.
PLOT_INTERVAL = 10.0
# If this many trials in a row fail before their first step, the cause is shared by all trials.
MAX_FAILED_STARTS = 3


class SweepInterrupted(Exception):
    """Raised when a signal has stopped the sweep and its trials have saved. `signal` is the signal's number."""

    def __init__(self, number: int, finished: int, trials: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} with {finished} of {trials} trials finished")
        self.signal = number


@dataclasses.dataclass
class RunningTrial:
    """A trial whose process is running."""

    trial: "Trial"
    process: TrialProcess
    config: Config
    values: dict[str, Any]
    n_records: int = 0  # lines of metrics.jsonl already processed


class SweepRunner:
    """One session of a sweep: starts trials and monitors them until the planned number is finished."""

    def __init__(self, folder: Path, plan: Plan, config: Config, workers: int, display: SweepDisplay) -> None:
        """`config` is any valid config of the search space. The caller must hold the folder's lock."""
        self.folder, self.plan, self.workers, self.display = folder, plan, workers, display
        self.study = open_study(folder)
        self.study.set_user_attr("plan", plan.to_json())
        self.study.pruner = make_pruner(plan, config)
        self.orphans = [trial for trial in self.unfinished_trials() if trial.number < plan.trials]
        self.running: list[RunningTrial] = []
        self.failed_starts = 0
        self.stop_signal = 0
        self.plotted_at = time.monotonic()

    def unfinished_trials(self) -> list["FrozenTrial"]:
        """Return the trials that were started but have no result: running now, or left by an earlier session."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def run(self) -> None:
        """Run trials until none is left. Raises `SweepInterrupted` after a signal, once all trials have saved."""
        n_stopped = stop_orphans(trial_dir(self.folder, trial.number) for trial in self.orphans)
        if n_stopped:
            log.info("stopped %d trials left running by an earlier session; they will be resumed", n_stopped)
        try:
            try:
                while not self.stop_signal and self.start_workers():
                    time.sleep(POLL_INTERVAL)
                    self.poll()
            finally:
                self.stop_all()
                self.update_outputs(last=True)
        except KeyboardInterrupt:
            for running in self.running:
                running.process.kill()
            raise
        if self.stop_signal:
            n_finished = len(self.study.get_trials(deepcopy=False)) - len(self.unfinished_trials())
            raise SweepInterrupted(self.stop_signal, n_finished, self.plan.trials)

    def stop_all(self) -> None:
        """Ask all running trials to save and exit, and wait until they have."""
        for running in self.running:
            running.process.stop()
        while self.running:
            time.sleep(POLL_INTERVAL)
            self.poll()

    def start_workers(self) -> bool:
        """Start trials until every worker has one; return whether any trial is running."""
        while len(self.running) < self.workers and not self.stop_signal:
            trial = self.next_trial()
            if trial is None:
                break
            self.start_trial(trial)
        return bool(self.running)

    def next_trial(self) -> "Trial | None":
        """Return a trial that an earlier session left unfinished, else a new one; None if all planned ones exist."""
        from optuna.trial import Trial, TrialState

        if self.orphans:
            orphan = self.orphans.pop(0)
            self.study.sampler = make_sampler(self.plan, orphan.number)
            return Trial(self.study, orphan._trial_id)
        trials = self.study.get_trials(deepcopy=False)
        # A trial is enqueued but not started if the sweep was killed between the two calls below.
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        number = waiting[0].number if waiting else len(trials)
        if number >= self.plan.trials:
            return None
        if self.plan.sampler == "grid" and not waiting:
            self.study.enqueue_trial(self.plan.space.grid()[number])
        self.study.sampler = make_sampler(self.plan, number)
        return self.study.ask()

    def start_trial(self, trial: "Trial") -> None:
        """Start the process of a trial. Invalid settings, or a trial that is already complete, need no process."""
        values = {domain.name: domain.suggest(trial) for domain in self.plan.space.domains}
        try:
            config = self.plan.space.build_config(values)
        except UserError as error:
            self.finish_trial(trial, values, Outcome("invalid", reason=str(error), settings_to_blame=True))
            return
        folder = trial_dir(self.folder, trial.number)
        prepare_dir(folder, config)
        outcome = read_outcome(folder)
        if outcome.state == "complete":  # a killed sweep could not report it to Optuna
            self.finish_trial(trial, values, outcome)
            return
        used_slots = {running.process.slot for running in self.running}
        slot = next(i for i in range(self.workers) if i not in used_slots)
        self.display.start_trial(trial.number, config.train.steps)
        process = TrialProcess(folder, slot, self.workers, config.train.device)
        self.running.append(RunningTrial(trial, process, config, values))

    def poll(self) -> None:
        """Process the evaluations since the last call, and the trials whose process has ended."""
        for running in list(self.running):
            ended = running.process.has_ended()  # read the metrics after this, to miss no line
            self.report_evaluations(running)
            if not ended:
                continue
            self.running.remove(running)
            outcome = running.process.final_outcome()
            if outcome is None:
                self.display.remove_trial(running.trial.number)
                continue
            failed_at_once = outcome.state == "failed" and not running.process.has_started()
            self.failed_starts = self.failed_starts + 1 if failed_at_once else 0
            self.finish_trial(running.trial, running.values, outcome)
            if self.failed_starts == MAX_FAILED_STARTS:
                raise UserError(
                    f"{MAX_FAILED_STARTS} trials in a row failed before their first step, the last: {outcome.reason};"
                    " fix the settings they share, and start a sweep in another --out"
                )

    def report_evaluations(self, running: RunningTrial) -> None:
        """Report new evaluations to Optuna, and stop the trial if the pruner says so."""
        records = read_records(running.process.folder)
        new_records, running.n_records = records[running.n_records :], len(records)
        trial = running.trial
        reported_values = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values if new_records else {}
        for record in new_records:
            bits = record.get("val_bits_per_byte")
            text = f"{bits:.4f} bits per byte" if bits is not None else f"loss {record.get('loss', 0):.3f}"
            self.display.update_trial(trial.number, record["step"], text)
            if bits is None or record.get("final") or record["step"] in reported_values:
                continue
            trial.report(bits, record["step"])
            if not running.process.prune_reason and trial.should_prune():
                running.process.prune_reason = (
                    f"{bits:.4f} bits per byte at step {record['step']}, worse than most others"
                )
                running.process.stop()

    def finish_trial(self, trial: "Trial", values: dict[str, Any], outcome: Outcome) -> None:
        """Store the outcome of a trial, report it to Optuna, and print it.

        If the settings are to blame, Optuna is told "pruned" rather than "failed": samplers ignore failed trials, but
        learn to avoid pruned ones.
        """
        from optuna.trial import TrialState

        trial.set_user_attr("outcome", dataclasses.asdict(outcome))
        if outcome.state == "complete":
            self.study.tell(trial, outcome.bits_per_byte)
        else:
            is_informative = outcome.state == "pruned" or outcome.settings_to_blame
            self.study.tell(trial, state=TrialState.PRUNED if is_informative else TrialState.FAIL)
        self.display.remove_trial(trial.number)
        best = find_best(self.update_outputs())
        settings = "  ".join(f"{name} {format_setting(value)}" for name, value in values.items())
        result_text = f"{outcome.state} ({outcome.reason})"
        if outcome.state == "complete":
            result_text = f"{outcome.bits_per_byte:.4f} bits per byte in {outcome.seconds:,.0f} s"
        best_text = f"  (best: {best.bits:.4f}, trial {best.number})" if best else ""
        self.display.print_line(f"trial {trial.number} of {self.plan.trials}  {settings}: {result_text}{best_text}")

    def update_outputs(self, *, last: bool = False) -> list[TrialResult]:
        """Update results.csv, best.toml, the display and, at most every PLOT_INTERVAL seconds, sweep.png."""
        space = self.plan.space
        results = read_results(self.study, space, self.folder)
        write_results(self.folder, space, results)
        if last or time.monotonic() - self.plotted_at >= PLOT_INTERVAL:
            title = f"{self.folder.resolve().name}: {len(results)} trials"
            plot_results(results, space.domains, self.folder / "sweep.png", title)
            self.plotted_at = time.monotonic()
        best = find_best(results)
        n_finished = sum(result.outcome.state != "unfinished" for result in results)
        self.display.update_finished(n_finished, f"best {best.bits:.4f} (trial {best.number})" if best else "")
        return results


def run_sweep(folder: Path, plan: Plan, config: Config, workers: int) -> None:
    """Run all unfinished trials of a plan. `config` is any valid config of its search space.

    Raises `SweepInterrupted` after SIGINT or SIGTERM, once the trials have saved; `UserError` if another sweep is
    running in the folder.
    """
    with exclusive_lock(folder), SweepDisplay(plan.trials, 0) as display:
        runner = SweepRunner(folder, plan, config, workers, display)
        with signals.handle_signals(make_signal_handler(runner)):
            runner.run()


def check_runnable(plan: Plan, config: Config) -> None:
    """Raise `UserError` for what would make every trial fail. `config` is any valid config of the search space."""
    for folder in plan.space.data_dirs(config):
        if len(open_split(folder, "val")[1]) < 2:
            raise UserError(f"{folder} has no validation stories to compare trials on; prepare it again with --val")
    if plan.prune != "none" and config.train.eval_every >= config.train.steps:
        raise UserError(
            f"train.eval_every={config.train.eval_every} leaves no evaluation before train.steps="
            f"{config.train.steps}, which --prune needs; lower train.eval_every, or leave out --prune"
        )


def make_signal_handler(runner: SweepRunner) -> Callable[[int], None]:
    """Return a handler: the first signal lets all trials save, the second one kills them."""

    def on_signal(number: int) -> None:
        if runner.stop_signal:
            raise KeyboardInterrupt
        runner.stop_signal = number
        log.info("stopping: the trials finish their current step and save; interrupt again to stop at once")

    return on_signal
