"""The search loop: ask Optuna for settings, train each trial in its own process, and report the result to Optuna.

It uses `study.ask` and `study.tell`, because `study.optimize` ends the trials that a signal interrupts, and ignores the
seed if there are several workers (docs/decisions/0011-sweeps.md).
"""

import contextlib
import dataclasses
import logging
import shlex
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
from optuna.trial import TrialState

from tinystories.config import Config
from tinystories.data.dataset import open_split
from tinystories.errors import UserError
from tinystories.files import hold_lock, write_errors
from tinystories.progress import StepDisplay
from tinystories.sweep import trial as trials
from tinystories.sweep.results import describe_result, find_best, read_results, write_results
from tinystories.sweep.study import LOCK, Plan, database_errors, make_pruner, make_sampler, open_study, read_trials
from tinystories.sweep.trial import Outcome
from tinystories.train.recording.side_work import SideWork
from tinystories.train.signals import handle_signals

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.1  # seconds between two checks of a running trial
# If this many trials in a row fail before their first step, the cause is shared by all trials.
MAX_FAILED_STARTS = 3


class SweepRunner:
    """One session of a sweep: each worker is a thread that runs one trial after the other until none is left."""

    def __init__(self, folder: Path, plan: Plan, config: Config, workers: int, display: StepDisplay) -> None:
        """`config` is any valid config of the search space. The caller must hold the folder's lock."""
        self.folder, self.plan, self.workers, self.display = folder, plan, workers, display
        self.study = open_study(folder)
        read_trials(self.study, plan.space, folder)  # before anything is trained
        self.study.set_user_attr("plan", plan.to_json())
        self.study.pruner = make_pruner(plan, config)
        self.lock = threading.Lock()  # held to change the study and the sweep's files
        self.failed_starts = 0  # in a row
        self.stopping = False  # let the running trials save, and start no more
        self.signals: list[int] = []  # received; the second one kills the trials
        self.side_work = SideWork()
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Run trials until none is left; return 0, or the signal after which all running trials have saved."""
        self.requeue_orphans()
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                for future in [pool.submit(self.run_worker, slot) for slot in range(self.workers)]:
                    future.result()
        finally:
            self.write_result_files()
        if not self.signals:
            return 0
        n_finished = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        name = signal.Signals(self.signals[0]).name
        self.display.print_line(
            f"stopped by {name} with {n_finished} of {self.plan.trials} trials finished; saved."
            f" Resume with: {format_resume_command(self.folder)}"
        )
        return self.signals[0]

    def write_result_files(self) -> None:
        """Write results.csv, best.toml and sweep.png; a failure is a warning, since the trials are in the database."""
        with self.side_work.attempt("results.csv, best.toml or sweep.png"):
            write_results(self.folder, self.plan.space, read_results(self.study, self.plan.space, self.folder))

    def requeue_orphans(self) -> None:
        """Let Optuna return the trials that an earlier session left unfinished before new ones, as they are."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        orphans = [trial for trial in running if trial.number < self.plan.trials]
        n_stopped = trials.stop_orphans(trials.trial_dir(self.folder, trial.number) for trial in orphans)
        if n_stopped:
            log.info("stopped %d trials left running by an earlier session; they will be resumed", n_stopped)
        for trial in orphans:
            self.study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def run_worker(self, slot: int) -> None:
        """Run trials until none is left or the sweep stops; an error stops the other workers too."""
        try:
            while not self.stopping and (trial := self.ask()) is not None:
                outcome = self.run_trial(trial, slot)
                if outcome.state == "unfinished" and outcome.reason:
                    outcome = self.judge_outside_cause(trial, outcome)
                if outcome.state != "unfinished":
                    self.finish_trial(trial, outcome)
        except BaseException:
            self.stopping = True
            raise

    def judge_outside_cause(self, trial: optuna.Trial, outcome: Outcome) -> Outcome:
        """Raise `UserError`, which stops the sweep, for a trial that a signal or the disk has stopped.

        A later session resumes it. Return it as failed if it had been resumed and died in the same way at the same
        step.
        """
        with self.lock:
            earlier = trial.user_attrs.get("stopped_by")
            trial.set_user_attr("stopped_by", [outcome.reason, outcome.step])
        if outcome.reason.startswith("killed") and earlier == [outcome.reason, outcome.step]:
            return dataclasses.replace(outcome, state="failed", reason=f"{outcome.reason} again at the same step")
        command = format_resume_command(self.folder)
        raise UserError(f"trial {trial.number} was stopped: {outcome.reason}; continue with: {command}")

    def ask(self) -> optuna.Trial | None:
        """Return the next trial with its parameters: a waiting one or a new one; None if none is left."""
        with self.lock:
            existing = self.study.get_trials(deepcopy=False)
            number = next((trial.number for trial in existing if trial.state == TrialState.WAITING), len(existing))
            if number >= self.plan.trials:
                return None
            if self.plan.sampler == "grid" and number == len(existing):
                self.study.enqueue_trial(self.plan.space.grid()[number])
            self.study.sampler = make_sampler(self.plan, number)
            return self.study.ask(dict(self.plan.space.distributions))

    def run_trial(self, trial: optuna.Trial, slot: int) -> Outcome:
        """Train a trial in its own process until it ends, is pruned, or the sweep stops."""
        folder = trials.trial_dir(self.folder, trial.number)
        try:
            config = self.plan.space.build_config(trial.params)
        except UserError as error:
            return Outcome("invalid", reason=str(error), settings_to_blame=True)
        outcome = trials.read_outcome(folder)
        if outcome.state != "unfinished":  # a killed sweep could not report it to Optuna
            return outcome
        environment = trials.worker_environment(slot, self.workers, config.train.device)
        log_start = trials.log_size(folder)
        process = trials.start_process(folder, config, environment)
        self.processes.append(process)
        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)  # by earlier sessions
        prune_reason = ""
        try:
            while process.poll() is None and not self.stopping and not prune_reason:
                time.sleep(POLL_INTERVAL)
                prune_reason = self.report_evaluations(trial, folder, reported)
        finally:
            process.terminate()  # so that it saves and exits, unless it has already ended
            exit_code = process.wait()
            self.processes.remove(process)
        prune_reason = prune_reason or self.report_evaluations(trial, folder, reported)
        if len(self.signals) > 1:
            return outcome
        return trials.final_outcome(folder, exit_code, prune_reason, log_start=log_start, asked_to_stop=self.stopping)

    def report_evaluations(self, trial: optuna.Trial, folder: Path, reported: set[int]) -> str:
        """Report evaluations at new steps to Optuna; return why the trial should be pruned, or an empty string."""
        for record in trials.read_records(folder):
            step, bits = record["step"], record.get("val_bits_per_byte")
            if bits is None or record.get("final") or step in reported:
                continue
            reported.add(step)
            with self.lock:
                trial.report(bits, step)
                if trial.should_prune():
                    return f"{bits:.4f} bits per byte at step {step}, worse than most others"
        return ""

    def finish_trial(self, trial: optuna.Trial, outcome: Outcome) -> None:
        """Store the outcome of a trial, report it to Optuna, and print it.

        If the settings are to blame, Optuna is told "pruned" rather than "failed": samplers ignore failed trials, but
        learn to avoid pruned ones. `UserError` if too many trials in a row have failed before their first step.
        """
        with self.lock:
            trial.set_user_attr("outcome", dataclasses.asdict(outcome))
            if outcome.state == "complete":
                self.study.tell(trial, outcome.bits_per_byte)
            else:
                is_informative = outcome.state == "pruned" or outcome.settings_to_blame
                self.study.tell(trial, state=TrialState.PRUNED if is_informative else TrialState.FAIL)
            results = read_results(self.study, self.plan.space, self.folder)
            best = find_best(results)
            best_text = f"best: {best.bits:.4f}, trial {best.number}" if best else "no trial is complete yet"
            result = next(result for result in results if result.number == trial.number)
            self.display.print_line(f"{describe_result(result)} ({best_text})")
            n_finished = sum(result.outcome.state != "unfinished" for result in results)
            self.display.update(n_finished, best_text, log_line=False)
            if outcome.state == "invalid":
                return
            self.write_result_files()
            has_started = (trials.trial_dir(self.folder, trial.number) / "metrics.jsonl").exists()
            self.failed_starts = 0 if has_started else self.failed_starts + 1
            if self.failed_starts == MAX_FAILED_STARTS:
                raise UserError(
                    f"{MAX_FAILED_STARTS} trials in a row failed before their first step, the last: {outcome.reason};"
                    " fix the settings they share, and start a sweep in another --out"
                )

    def on_signal(self, number: int) -> None:
        """Let all trials save after the first signal; kill them after the second."""
        self.stopping = True
        self.signals.append(number)
        if len(self.signals) > 1:
            for process in list(self.processes):
                process.kill()
            raise KeyboardInterrupt
        log.info("stopping: the trials finish their current step and save; interrupt again to stop at once")


def format_resume_command(folder: Path) -> str:
    return f"tinystories sweep --out {shlex.quote(str(folder))} --resume"


def run_sweep(folder: Path, plan: Plan, config: Config, workers: int) -> int:
    """Run all unfinished trials of a plan; return 0, or the signal that stopped the sweep once the trials have saved.

    `config` is any valid config of the search space. `UserError` if another sweep is running in the folder.
    """
    with contextlib.ExitStack() as stack:
        with write_errors(f"--out {folder}"):
            stack.enter_context(hold_lock(folder / LOCK, "sweep"))
        display = stack.enter_context(StepDisplay(plan.trials, 0, unit="trial"))
        stack.enter_context(database_errors(folder))
        runner = SweepRunner(folder, plan, config, workers, display)
        with handle_signals(runner.on_signal):
            return runner.run()


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
