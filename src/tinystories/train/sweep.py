"""The search: asks Optuna for settings, trains each trial in a process of its own, tells Optuna what came of it."""

import dataclasses
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.config import Config
from tinystories.data.prepared import open_split
from tinystories.errors import UserError
from tinystories.train import signals
from tinystories.train.display import SweepDisplay
from tinystories.train.results import Result, best_of, draw, read_results, shown, write_results
from tinystories.train.study import Plan, alone, open_study, pruner_of, sampler_of
from tinystories.train.trial import Outcome, Process, folder_of, measured, place, read_records, stop_left_over

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)

PAUSE = 0.1  # seconds between looks at the trials
PICTURE_PAUSE = 10.0  # seconds at least between two drawings of sweep.png: each takes a good part of one
STILLBORN = 3  # trials in a row that fail before their first step: then something is wrong that all of them share


class Stopped(Exception):
    """The sweep was asked to stop; its trials are saved. `signal` is the signal's number."""

    def __init__(self, number: int, finished: int, trials: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} with {finished} of {trials} trials finished")
        self.signal = number


@dataclasses.dataclass
class Running:
    """A trial under way."""

    trial: "Trial"
    process: Process
    config: Config
    values: dict[str, Any]
    n_records: int = 0  # lines of metrics.jsonl seen


class Sweep:
    """One sitting of a sweep: starts trials, looks at them until there are as many as planned."""

    def __init__(self, folder: Path, plan: Plan, config: Config, workers: int, display: SweepDisplay) -> None:
        """`config` is one of the space. The caller holds the folder's lock."""
        self.folder, self.plan, self.workers, self.display = folder, plan, workers, display
        self.study = open_study(folder)
        self.study.set_user_attr("plan", plan.to_json())
        self.study.pruner = pruner_of(plan, config)
        self.left_over = [trial for trial in self.unfinished() if trial.number < plan.trials]
        self.running: list[Running] = []
        self.stillborn = 0
        self.stop_signal = 0
        self.drawn = time.monotonic()

    def unfinished(self) -> list["FrozenTrial"]:
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def run(self) -> None:
        """Raises `Stopped` after a signal, once all trials have saved."""
        stopped = stop_left_over(folder_of(self.folder, trial.number) for trial in self.left_over)
        if stopped:
            log.info("stopped %d trials that an earlier sweep had left running; they go on", stopped)
        try:
            try:
                while not self.stop_signal and self.fill():
                    time.sleep(PAUSE)
                    self.look()
            finally:
                self.stop_all()
                self.write(last=True)
        except KeyboardInterrupt:
            for running in self.running:
                running.process.kill()
            raise
        if self.stop_signal:
            finished = len(self.study.get_trials(deepcopy=False)) - len(self.unfinished())
            raise Stopped(self.stop_signal, finished, self.plan.trials)

    def stop_all(self) -> None:
        for running in self.running:
            running.process.stop()
        while self.running:
            time.sleep(PAUSE)
            self.look()

    def fill(self) -> bool:
        """Start trials until all workers have one; False when none is left to wait for."""
        while len(self.running) < self.workers and not self.stop_signal:
            trial = self.next_trial()
            if trial is None:
                break
            self.begin(trial)
        return bool(self.running)

    def next_trial(self) -> "Trial | None":
        """One that an earlier sitting has left unfinished, or else a new one."""
        from optuna.trial import Trial, TrialState

        if self.left_over:
            left = self.left_over.pop(0)
            self.study.sampler = sampler_of(self.plan, left.number)
            return Trial(self.study, left._trial_id)
        trials = self.study.get_trials(deepcopy=False)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]  # a kill came before its start
        number = waiting[0].number if waiting else len(trials)
        if number >= self.plan.trials:
            return None
        if self.plan.sampler == "grid" and not waiting:
            self.study.enqueue_trial(self.plan.space.grid()[number])
        self.study.sampler = sampler_of(self.plan, number)
        return self.study.ask()

    def begin(self, trial: "Trial") -> None:
        """Start the process of a trial; it may also be over at once."""
        values = {domain.name: domain.suggest(trial) for domain in self.plan.space.domains}
        try:
            config = self.plan.space.config(values)
        except UserError as error:
            self.finish(trial, values, Outcome("invalid", reason=str(error), settings_to_blame=True))
            return
        folder = folder_of(self.folder, trial.number)
        place(folder, config)
        found = measured(folder)
        if found.state == "complete":  # a kill came before it was told
            self.finish(trial, values, found)
            return
        taken = {running.process.slot for running in self.running}
        slot = next(i for i in range(self.workers) if i not in taken)
        self.display.begin(trial.number, config.train.steps)
        process = Process(folder, slot, self.workers, config.train.device)
        self.running.append(Running(trial, process, config, values))

    def look(self) -> None:
        """Take in what the trials have measured since the last look, and those that have ended."""
        for running in list(self.running):
            ended = running.process.ended()  # before its last lines are read
            self.report(running)
            if not ended:
                continue
            self.running.remove(running)
            outcome = running.process.outcome()
            if outcome is None:
                self.display.end(running.trial.number)
                continue
            failed_at_once = outcome.state == "failed" and not running.process.began()
            self.stillborn = self.stillborn + 1 if failed_at_once else 0
            self.finish(running.trial, running.values, outcome)
            if self.stillborn == STILLBORN:
                raise UserError(
                    f"{STILLBORN} trials in a row failed before their first step, the last: {outcome.reason};"
                    " mend what they share, and sweep in another --out"
                )

    def report(self, running: Running) -> None:
        """Hand new evaluations to Optuna, and stop a trial that is worse than others were."""
        records = read_records(running.process.folder)
        new, running.n_records = records[running.n_records :], len(records)
        trial = running.trial
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values if new else {}
        for record in new:
            bits = record.get("val_bits_per_byte")
            text = f"{bits:.4f} bits per byte" if bits is not None else f"loss {record.get('loss', 0):.3f}"
            self.display.update(trial.number, record["step"], text)
            if bits is None or record.get("final") or record["step"] in known:
                continue
            trial.report(bits, record["step"])
            if not running.process.pruned and trial.should_prune():
                running.process.pruned = f"{bits:.4f} bits per byte at step {record['step']}, worse than most others"
                running.process.stop()

    def finish(self, trial: "Trial", values: dict[str, Any], outcome: Outcome) -> None:
        """Store what came of a trial, and say so.

        Optuna calls it pruned where its settings are to blame, so that the sampler keeps away from them: what has
        failed teaches it nothing.
        """
        from optuna.trial import TrialState

        trial.set_user_attr("outcome", dataclasses.asdict(outcome))
        if outcome.state == "complete":
            self.study.tell(trial, outcome.bits_per_byte)
        else:
            learnt = outcome.state == "pruned" or outcome.settings_to_blame
            self.study.tell(trial, state=TrialState.PRUNED if learnt else TrialState.FAIL)
        self.display.end(trial.number)
        best = best_of(self.write())
        settings = "  ".join(f"{name} {shown(value)}" for name, value in values.items())
        what = f"{outcome.state} ({outcome.reason})"
        if outcome.state == "complete":
            what = f"{outcome.bits_per_byte:.4f} bits per byte in {outcome.seconds:,.0f} s"
        ranked = f"  (best: {best.bits:.4f}, trial {best.number})" if best else ""
        self.display.say(f"trial {trial.number} of {self.plan.trials}  {settings}: {what}{ranked}")

    def write(self, *, last: bool = False) -> list[Result]:
        """Bring the files and the display up to date."""
        space = self.plan.space
        results = read_results(self.study, space, self.folder)
        write_results(self.folder, space, results)
        if last or time.monotonic() - self.drawn >= PICTURE_PAUSE:
            title = f"{self.folder.resolve().name}: {len(results)} trials"
            draw(results, space.domains, self.folder / "sweep.png", title)
            self.drawn = time.monotonic()
        best = best_of(results)
        finished = sum(result.outcome.state != "unfinished" for result in results)
        self.display.finished(finished, f"best {best.bits:.4f} (trial {best.number})" if best else "")
        return results


def sweep(folder: Path, plan: Plan, config: Config, workers: int) -> None:
    """Run the trials of a plan that are not finished yet. `config` is one of its space.

    Raises `Stopped` after SIGINT or SIGTERM, once the trials have saved.
    """
    with alone(folder), SweepDisplay(plan.trials, 0) as display:
        search = Sweep(folder, plan, config, workers, display)
        with signals.taken_by(stopping(search)):
            search.run()


def require_runnable(plan: Plan, config: Config) -> None:
    """Refuse at once what would make every trial fail. `config` is one of the space."""
    for folder in plan.space.data_folders(config):
        if len(open_split(folder, "val")[1]) < 2:
            raise UserError(f"{folder} has no validation stories to compare trials by; prepare it with --val")
    if plan.prune != "none" and config.train.eval_every >= config.train.steps:
        raise UserError(
            f"train.eval_every={config.train.eval_every} leaves no evaluation before train.steps="
            f"{config.train.steps}: nothing to prune by; lower train.eval_every, or leave out --prune"
        )


def stopping(search: Sweep) -> Callable[[int], None]:
    """The first signal lets the trials save; the second one ends them at once."""

    def ask(number: int) -> None:
        if search.stop_signal:
            raise KeyboardInterrupt
        search.stop_signal = number
        log.info("stopping: the trials finish their steps and save; once more to stop at once")

    return ask
