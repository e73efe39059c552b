"""A sweep loses no trial and repeats none, however it ends, and its files record the outcome of each.

Most trials here are trained by a stand-in for `tinystories train` that starts at once: it writes the lines of
metrics.jsonl, resumes where it stopped, and saves on a signal. tests/cli/test_sweep_command.py has the real one.
"""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tinystories.config_file import load_config
from tinystories.errors import UserError
from tinystories.sweep import trial
from tinystories.sweep.results import TrialResult, at_boundary, find_best, format_table, read_results
from tinystories.sweep.runner import check_runnable, run_sweep
from tinystories.sweep.search_space import parse_search_space
from tinystories.sweep.study import Plan, merge_plan, open_study, read_plan

pytestmark = pytest.mark.extended

# Bits per byte are 2 + (lg rate + 2)^2 at the end and one more for each step before it; `sample_tokens` hundredths of a
# second make a step. A trial with a file SWEEP/hold-trial-NNNN waits after the step named there until it is
# stopped. The rate 1 is not finite; n_layer 7 crashes, 8 is refused before the first step, 9 does not react to signals.
STAND_IN = """
import json, math, os, signal, sys, time, tomllib
from pathlib import Path
run = Path(sys.argv[2])
config = tomllib.loads((run / "config.toml").read_text())
stopped = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: stopped.append(number) if config["model"]["n_layer"] != 9 else None)
with (run / "starts").open("a") as starts:
    starts.write(f"{os.getpid()}\\n")
if config["model"]["n_layer"] == 8:
    sys.exit("error: no such device")
metrics = run / "metrics.jsonl"
done = metrics.read_text().count("\\n") if metrics.exists() else 0
rate, steps = config["optim"]["learning_rate"], config["train"]["steps"]
rate = 0.01 if rate == "auto" else rate
bits = 2 + (math.log10(rate) + 2) ** 2
with metrics.open("a") as file:
    for step in range(done + 1, steps + 1):
        time.sleep(config["train"]["sample_tokens"] / 100)
        if config["model"]["n_layer"] == 7:
            raise RuntimeError("out of luck")
        if rate == 1:
            print("error: loss nan at step 3 is not finite", file=sys.stderr)
            sys.exit(2)
        record = {"step": step, "tokens": 64 * step, "seconds": step / 10, "val_bits_per_byte": bits + steps - step}
        file.write(json.dumps(record | ({"final": True} if step == steps else {})) + "\\n")
        file.flush()
        hold = run.parent / f"hold-{run.name}"
        while hold.exists() and step == int(hold.read_text()) and not stopped:
            time.sleep(0.01)
        if stopped and step < steps:
            sys.exit(128 + stopped[0])
"""

# A sweep in a process of its own, with the stand-in.
PROGRAM = """
import sys
from pathlib import Path
from tinystories.sweep import trial
from tinystories.sweep.study import Plan
from tinystories.sweep.runner import run_sweep
trial.train_command = lambda folder: [sys.executable, "-S", {stand_in!r}, "train", str(folder.resolve()), "--resume"]
plan = Plan.from_json({plan!r})
run_sweep(Path({folder!r}), plan, plan.space.find_valid_config(), workers=2)
"""

QUICK = {"train.steps": "3", "train.sample_tokens": "1"}
RATES = {"optim.learning_rate": "1e-4:1e-1:log"}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(
        trial,
        "train_command",
        lambda folder: [sys.executable, "-S", str(script), "train", str(folder.resolve()), "--resume"],
    )
    return script


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here."""
    monkeypatch.setattr("tinystories.sweep.results.plot_results", lambda *_: None)


def plan_of(settings: dict[str, str], **options: Any) -> Plan:
    return merge_plan(None, parse_search_space({}, "mine.toml", QUICK | settings), options, Path("x"))


def run(folder: Path, plan: Plan, workers: int = 1) -> list[TrialResult]:
    run_sweep(folder, plan, plan.space.find_valid_config(), workers)
    return read_results(open_study(folder), plan.space, folder)


def by_number(results: list[TrialResult]) -> list[tuple[Any, ...]]:
    return sorted((r.number, r.settings, r.outcome.state, r.outcome.bits_per_byte) for r in results)


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


@pytest.mark.usefixtures("stand_in")
def test_a_sweep_finds_the_best_and_leaves_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "we?ird #50% sweep"
    plan = plan_of(RATES | {"train.batch_size": "32,64", "optim.kind": "muon,adamw"}, trials=12)
    results = run(folder, plan, workers=3)
    best = find_best(results)
    assert best is not None
    assert best.bits == min(result.bits for result in results) < 2.3
    assert [r.bits for r in results] == sorted(r.bits for r in results)
    assert all(r.outcome.tokens == 192 and r.outcome.seconds == 0.3 for r in results)
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == [result.number for result in results]
    assert [float(row["optim.learning_rate"]) for row in rows] == [r.settings["optim.learning_rate"] for r in results]
    assert load_config(folder / "best.toml") == plan.space.build_config(best.settings)
    assert load_config(folder / "best.toml").optim.learning_rate == best.settings["optim.learning_rate"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"trial-{best.number:04d}" / trial.LOG_FILE).exists()
    shown = format_table(results, list(plan.space.texts)).splitlines()
    assert shown[0].split() == [
        "trial", "bits/byte", "optim.learning_rate", "train.batch_size", "optim.kind", "tokens", "seconds", "state"
    ]  # fmt: skip
    assert shown[1].split()[0] == str(best.number)
    assert len(shown) == 13


@pytest.mark.usefixtures("stand_in", "no_picture")
def test_settings_that_do_not_go_together_are_skipped_with_the_reason(tmp_path: Path) -> None:
    plan = plan_of({"model.n_head": "4,5,7", "model.n_embd": "100"}, sampler="grid")
    results = run(tmp_path / "sweep", plan)
    assert [(r.settings["model.n_head"], r.outcome.state) for r in results] == [
        (5, "complete"), (4, "invalid"), (7, "invalid")
    ]  # fmt: skip
    assert results[1].outcome.reason.startswith("mine.toml: model.n_embd/model.n_head=25 must be even")
    assert results[2].outcome.reason.endswith("model.n_embd=100 must be a multiple of model.n_head=7")
    assert "trial 2 invalid: mine.toml: model.n_embd=100" in format_table(results, ["model.n_head"])
    assert sorted(path.name for path in (tmp_path / "sweep").glob("trial-*")) == ["trial-0001"]


@pytest.mark.usefixtures("stand_in", "no_picture")
def test_a_trial_that_fails_does_not_end_the_sweep(tmp_path: Path) -> None:
    plan = plan_of({"optim.learning_rate": "1,1e-3", "model.n_layer": "1,7"}, sampler="grid")
    results = {r.number: r.outcome for r in run(tmp_path / "sweep", plan, workers=2)}
    assert [results[i].state for i in range(4)] == ["failed", "failed", "complete", "failed"]
    assert results[0].reason == "loss nan at step 3 is not finite"
    assert results[3].reason == f"exit code 1; see {tmp_path / 'sweep' / 'trial-0003' / trial.LOG_FILE}"
    told = [trial.state.name for trial in open_study(tmp_path / "sweep").trials]
    assert told == ["PRUNED", "FAIL", "COMPLETE", "FAIL"], "the sampler learns from the settings, not from the crash"


@pytest.mark.usefixtures("stand_in", "no_picture")
def test_an_error_of_every_trial_stops_the_sweep(tmp_path: Path) -> None:
    plan = plan_of(RATES | {"model.n_layer": "8"}, trials=9)
    with pytest.raises(UserError, match="3 trials in a row failed before their first step, the last: exit code 1"):
        run(tmp_path / "sweep", plan)
    assert len(open_study(tmp_path / "sweep").trials) == 3


@pytest.mark.usefixtures("stand_in", "no_picture")
def test_an_error_in_one_worker_lets_the_trials_of_the_others_save(tmp_path: Path) -> None:
    plan = plan_of({"model.n_layer": "1,8", "optim.learning_rate": "1e-2,2e-2,3e-2"}, sampler="grid")
    hold(tmp_path / "sweep", 0)
    with pytest.raises(UserError, match="3 trials in a row failed"):
        run(tmp_path / "sweep", plan, workers=2)
    results = read_results(open_study(tmp_path / "sweep"), plan.space, tmp_path / "sweep")
    assert [(r.number, r.outcome.state) for r in results[:3]] == [(1, "complete"), (2, "complete"), (0, "unfinished")]
    assert not is_alive(int((tmp_path / "sweep" / "trial-0000" / "starts").read_text()))


@pytest.mark.usefixtures("stand_in", "no_picture")
def test_a_second_signal_kills_the_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "sweep"
    plan = plan_of(RATES | {"model.n_layer": "9"}, trials=1)
    hold(folder, 0)

    def interrupt_twice() -> None:
        stop_in_the_middle(folder, 0)
        wait_for(lambda: "interrupt again to stop at once" in caplog.text)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=interrupt_twice)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(folder, plan, plan.space.find_valid_config(), 1)
    stopper.join()
    assert not is_alive(int((folder / "trial-0000" / "starts").read_text()))
    assert [r.outcome.state for r in read_results(open_study(folder), plan.space, folder)] == ["unfinished"]
    (folder / "hold-trial-0000").unlink()
    assert [r.outcome.state for r in run(folder, plan)] == ["complete"]


@pytest.mark.usefixtures("stand_in", "no_picture")
@pytest.mark.parametrize("prune", ["median", "hyperband"])
def test_bad_trials_are_pruned_and_saved(tmp_path: Path, prune: str) -> None:
    rates = "1e-2,2e-2,3e-2,4e-2,5e-2,1e-4,6e-2"
    settings = {"optim.learning_rate": rates, "train.steps": "10", "train.eval_every": "2"}
    hold(tmp_path / "sweep", 5, step=7)
    results = run(tmp_path / "sweep", plan_of(settings, sampler="grid", prune=prune))
    assert {r.settings["optim.learning_rate"]: r.outcome.state for r in results}[1e-4] == "pruned"
    pruned = next(r for r in results if r.number == 5)
    assert 0 < pruned.outcome.step <= 7
    assert "worse than most others" in pruned.outcome.reason
    assert len(results) == 7
    assert results[0].bits == 2


@pytest.mark.usefixtures("stand_in", "no_picture")
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_a_stopped_and_resumed_sweep_is_the_straight_one(
    tmp_path: Path, sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = {"optim.learning_rate": "1e-3,1e-2,2e-2" if sampler == "grid" else "1e-4:1e-1:log"}
    plan = plan_of(settings | {"schedule.warmup": "0:0.2:0.1"}, sampler=sampler, trials=5)
    straight = run(tmp_path / "straight", plan)
    folder = tmp_path / "sweep"
    for number in (0, 2):
        hold(folder, number)
        stopper = threading.Thread(target=stop_in_the_middle, args=(folder, number))
        stopper.start()
        assert run_sweep(folder, plan, plan.space.find_valid_config(), 1) == signal.SIGINT
        stopper.join()
        assert f"stopped by SIGINT with {number} of 5 trials finished" in caplog.text
    assert by_number(run(folder, plan)) == by_number(straight)
    assert [starts(path) for path in sorted(folder.glob("trial-*"))] == [2, 1, 2, 1, 1]
    more = dataclasses.replace(plan, trials=6)
    assert by_number(run(folder, more))[:5] == by_number(straight)
    assert by_number(run(folder, more))[:5] == by_number(straight), "with nothing left it does nothing"
    assert [starts(path) for path in sorted(folder.glob("trial-*"))] == [2, 1, 2, 1, 1, 1]


def stop_in_the_middle(folder: Path, number: int) -> None:
    """SIGINT to this process when the trial has measured something and goes on."""
    wait_for(lambda: bool(trial.read_records(trial.trial_dir(folder, number))))
    os.kill(os.getpid(), signal.SIGINT)


def hold(folder: Path, number: int, step: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"hold-trial-{number:04d}").write_text(str(step))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 250
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.mark.usefixtures("no_picture")
def test_killed_it_loses_no_trial_and_repeats_none(stand_in: Path, tmp_path: Path) -> None:
    """The trials of a killed sweep train on by themselves; the next session stops and resumes them."""
    plan = plan_of(RATES, trials=4)
    straight = run(tmp_path / "straight", plan)
    folder = tmp_path / "sweep"
    hold(folder, 0)
    hold(folder, 1)
    text = PROGRAM.format(stand_in=str(stand_in), plan=plan.to_json(), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", text])
    wait_for(lambda: all(trial.read_records(trial.trial_dir(folder, number)) for number in (0, 1)))
    process.kill()
    process.wait()
    left = [int((trial.trial_dir(folder, number) / "starts").read_text()) for number in (0, 1)]
    assert all(is_alive(pid) for pid in left)
    assert by_number(run(folder, plan, workers=2)) == by_number(straight)
    assert not any(is_alive(pid) for pid in left)
    for number in range(4):
        steps = [record["step"] for record in trial.read_records(trial.trial_dir(folder, number))]
        assert steps == [1, 2, 3], "no two processes wrote it, and what was done is not done again"
    assert [starts(path) for path in sorted(folder.glob("trial-*"))] == [2, 2, 1, 1]


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path) -> None:
    plan = plan_of(RATES, trials=1)
    program = "import sys; from pathlib import Path; from tinystories.files import acquire_lock\n"
    program += (
        f"lock = acquire_lock(Path({str(tmp_path / '.lock')!r})); print(lock is not None, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"True\n"
    with pytest.raises(UserError, match="in use by another sweep"):
        run(tmp_path, plan)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    other.kill()
    other.communicate()
    assert read_plan(tmp_path) is None


def test_a_sweep_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    stored = plan_of(RATES, trials=4)
    same = parse_search_space({}, "mine.toml", QUICK | RATES)
    assert merge_plan(stored, None, {"trials": 9}, tmp_path).trials == 9
    assert merge_plan(stored, same, {}, tmp_path) == stored
    for changed, message in [
        (QUICK | {"optim.learning_rate": "1e-4:1e-2:log"}, "optim.learning_rate 1e-4:1e-1:log, not 1e-4:1e-2:log"),
        (QUICK | RATES | {"train.steps": "4"}, "train.steps 3, not 4"),
        (QUICK | RATES | {"model.n_layer": "1,2"}, "model.n_layer unset, not 1,2"),
        (QUICK, "optim.learning_rate 1e-4:1e-1:log, not unset"),
    ]:
        with pytest.raises(UserError) as caught:
            merge_plan(stored, parse_search_space({}, "mine.toml", changed), {}, tmp_path)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="--sampler tpe, not random"):
        merge_plan(stored, None, {"sampler": "random"}, tmp_path)


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a sweep"):
        read_plan(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        read_plan(tmp_path / "thesis.tex")
    (tmp_path / "sweep.db").write_bytes(b"no database, no database, no database, no database, no database, no")
    with pytest.raises(UserError, match=r"sweep.db cannot be used: file is not a database"):
        read_plan(tmp_path)


def test_settings_that_fail_in_every_trial_are_refused_before(sample_data: Path, tmp_path: Path) -> None:
    plan = plan_of(RATES | {"data.dir": str(sample_data)})
    check_runnable(plan, plan.space.find_valid_config())
    nowhere = plan_of({"data.dir": f"choose:{sample_data},{tmp_path / 'nowhere'}"})
    with pytest.raises(UserError, match="nowhere holds no prepared data"):
        check_runnable(nowhere, nowhere.space.find_valid_config())
    late = plan_of(RATES | {"data.dir": str(sample_data), "train.eval_every": "3"}, prune="median")
    with pytest.raises(UserError, match=r"train.eval_every=3 leaves no evaluation before train.steps=3"):
        check_runnable(late, late.space.find_valid_config())


def test_workers_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert trial.worker_environment(0, 3, "cpu")["OMP_NUM_THREADS"] == "2"
    assert trial.worker_environment(0, 9, "cpu")["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in trial.worker_environment(0, 3, "cpu")
    assert [trial.worker_environment(i, 3, "auto")["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert [trial.worker_environment(i, 2, "cuda")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["4", "6"]
    assert trial.worker_environment(0, 3, "cpu")["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(("rate", "found"), [(1.05e-4, True), (9e-2, True), (1e-2, False)])
def test_a_best_value_at_an_end_is_pointed_out(rate: float, found: bool) -> None:
    distributions = parse_search_space({}, "x", RATES | {"train.batch_size": "32,64"}).distributions
    best = TrialResult(0, {"optim.learning_rate": rate, "train.batch_size": 32}, trial.Outcome("complete", 2.0))
    assert at_boundary(best, distributions) == ["optim.learning_rate"] * found
