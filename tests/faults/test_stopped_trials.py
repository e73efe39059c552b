"""A trial of a sweep that the disk or a signal has stopped says nothing about its settings: it is tried again."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tinystories.errors import UserError
from tinystories.sweep import trial
from tinystories.sweep.results import TrialResult, read_results
from tinystories.sweep.runner import run_sweep
from tinystories.sweep.search_space import parse_search_space
from tinystories.sweep.study import Plan, merge_plan, open_study

pytestmark = [pytest.mark.extended, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

# Writes one step per session, and then does what the file SWEEP/end-trial-NNNN says; without one it completes.
STAND_IN = """
import json, os, sys
from pathlib import Path
run = Path(sys.argv[2])
metrics = run / "metrics.jsonl"
step = metrics.read_text().count("\\n") + 1 if metrics.exists() else 1
end = run.parent / f"end-{run.name}"
words = end.read_text() if end.exists() else ""
record = {"step": step, "tokens": step, "val_bits_per_byte": 2.0} | ({} if words else {"final": True})
if "no step" not in words:
    metrics.open("a").write(json.dumps(record) + "\\n")
exec(words)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's folder; its trials are trained by the stand-in."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(
        trial, "train_command", lambda run: [sys.executable, "-S", str(script), "train", str(run.resolve())]
    )
    monkeypatch.setattr("tinystories.sweep.results.plot_results", lambda *_: None)
    (tmp_path / "sweep").mkdir()
    return tmp_path / "sweep"


def plan_of(**settings: str) -> Plan:
    texts = {"optim.learning_rate": "1e-3,1e-2,1e-1", "train.steps": "9", **settings}
    return merge_plan(None, parse_search_space({}, "mine.toml", texts), {"sampler": "grid"}, Path("x"))


def run(folder: Path, plan: Plan | None = None, workers: int = 1) -> list[TrialResult]:
    plan = plan or plan_of()
    run_sweep(folder, plan, plan.space.find_valid_config(), workers)
    return sorted(read_results(open_study(folder), plan.space, folder), key=lambda result: result.number)


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in open_study(folder).trials]


def end_trial(folder: Path, number: int, code: str) -> Path:
    path = folder / f"end-trial-{number:04d}"
    path.write_text(code)
    return path


def print_error(text: str, code: int = 2) -> str:
    return f"sys.stderr.write({text!r}); sys.stderr.flush(); os._exit({code})"


def disk_error(number: int) -> str:
    return print_error(f"a warning\nerror: run/metrics.jsonl cannot be written: {os.strerror(number)}; free space\n")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (disk_error(errno.ENOSPC), "No space left on device"),
        (disk_error(errno.EDQUOT), os.strerror(errno.EDQUOT)),
        (disk_error(errno.EIO), os.strerror(errno.EIO)),
        (print_error("error: run/metrics.jsonl can"), "its error message could not be written to train.log"),
        (print_error(""), "its error message could not be written to train.log"),
        (print_error(f"Traceback\nOSError: [Errno 28] {os.strerror(errno.ENOSPC)}: 'x'\n", 1), "No space left"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("os.kill(os.getpid(), 15)", "killed by SIGTERM"),
        ("os._exit(143)", "killed by SIGTERM"),
    ],
    ids=["full", "quota", "failing", "half a message", "no message", "traceback", "kill", "term", "saved"],
)
def test_the_sweep_stops_and_the_settings_are_tried_again(folder: Path, code: str, reason: str) -> None:
    """The reported case is the first: Optuna was told to avoid these settings."""
    end = end_trial(folder, 1, code)
    with pytest.raises(UserError, match=r"trial 1 was stopped: .*; continue with: tinystories sweep --out") as caught:
        run(folder)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert states(folder) == ["COMPLETE", "RUNNING"]
    end.unlink()
    results = run(folder)
    assert [result.outcome.state for result in results] == ["complete"] * 3
    assert [result.outcome.step for result in results] == [1, 2, 1], "it continues, and no other trial is repeated"


def test_a_full_disk_stops_the_sweep_as_often_as_it_is_full(folder: Path) -> None:
    end_trial(folder, 0, "# no step\n" + disk_error(errno.ENOSPC))
    for _ in range(3):
        with pytest.raises(UserError, match="trial 0 was stopped"):
            run(folder)
    assert states(folder) == ["RUNNING"]


def test_a_trial_that_dies_again_at_the_same_step_has_failed(folder: Path) -> None:
    """It may need more memory than there is: the sweep must not stop there forever."""
    end_trial(folder, 0, "# no step\nos.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="trial 0 was stopped: killed by SIGKILL"):
        run(folder)
    results = run(folder)
    assert [result.outcome.state for result in results] == ["failed", "complete", "complete"]
    assert results[0].outcome.reason == "killed by SIGKILL again at the same step"
    assert states(folder) == ["FAIL", "COMPLETE", "COMPLETE"], "the sampler learns nothing from it"


def test_a_trial_that_comes_further_before_it_dies_again_is_tried_again(folder: Path) -> None:
    end_trial(folder, 0, "os.kill(os.getpid(), 9)")
    for _ in range(3):
        with pytest.raises(UserError, match="trial 0 was stopped: killed by SIGKILL"):
            run(folder)
    assert states(folder) == ["RUNNING"]


def test_an_error_of_the_settings_is_still_theirs(folder: Path) -> None:
    end_trial(folder, 0, print_error("error: loss nan at step 3 is not finite\n"))
    end_trial(folder, 1, print_error("Traceback\nRuntimeError: out of luck\n", 1))
    results = run(folder)
    assert [result.outcome.state for result in results] == ["failed", "failed", "complete"]
    assert states(folder) == ["PRUNED", "FAIL", "COMPLETE"]


def test_an_old_line_of_the_log_is_not_the_reason(folder: Path) -> None:
    """A relative: a later session appends to the same log."""
    end = end_trial(folder, 0, disk_error(errno.ENOSPC))
    with pytest.raises(UserError, match="trial 0 was stopped"):
        run(folder)
    end.write_text("os._exit(1)")
    assert run(folder)[0].outcome.reason == f"exit code 1; see {folder / 'trial-0000' / trial.LOG_FILE}"


def test_the_other_workers_save(folder: Path) -> None:
    """A relative: several trials at once on the same disk."""
    end_trial(folder, 0, "import time; [time.sleep(0.01) for _ in range(30_000)]")
    end_trial(folder, 1, disk_error(errno.ENOSPC))
    with pytest.raises(UserError, match="trial 1 was stopped"):
        run(folder, workers=2)
    assert states(folder) == ["RUNNING", "RUNNING"]
    for path in folder.glob("end-*"):
        path.unlink()
    assert [result.outcome.state for result in run(folder, workers=2)] == ["complete"] * 3


def test_a_trial_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative: no memory, or too many processes."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr("tinystories.sweep.trial.subprocess.Popen", refuse)
        with pytest.raises(UserError, match="trial-0000 cannot be started: Cannot allocate memory"):
            run(folder)
    assert [result.outcome.state for result in run(folder)] == ["complete"] * 3


def test_every_signal_has_a_name() -> None:
    assert trial.outside_cause(-signal.SIGSEGV, "") == "killed by SIGSEGV"


REAL = """
import errno, os, sys
from pathlib import Path
from tinystories.train import state
def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if Path({marker!r}).exists():
    state.save_file = refuse
from tinystories.cli import main
main(sys.argv[1:])
"""


def test_a_real_trial_on_a_full_disk(
    config: Any, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "full"
    marker.touch()
    program = REAL.format(marker=str(marker))
    monkeypatch.setattr(
        trial, "train_command", lambda run: [sys.executable, "-c", program, "train", "--out", str(run), "--resume"]
    )
    texts = {
        f"model.{name}": str(getattr(config.model, name)) for name in ("n_ctx", "n_layer", "n_head", "n_embd", "n_ff")
    }
    texts |= {"data.dir": str(sample_data), "train.steps": "2", "train.device": "cpu", "train.precision": "fp32"}
    texts |= {"optim.learning_rate": "1e-3,1e-2", "train.sample_tokens": "1"}
    plan = merge_plan(None, parse_search_space({}, "mine.toml", texts), {"sampler": "grid"}, Path("x"))
    with pytest.raises(UserError, match=r"trial 0 was stopped: .*step-0000002 could not be written \(No space left"):
        run(tmp_path / "sweep", plan)
    marker.unlink()
    assert [result.outcome.state for result in run(tmp_path / "sweep", plan)] == ["complete"] * 2
