"""kill -9: a training run killed at random moments and resumed each time ends with the weights of a straight run."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from campaign import base as valid_files
from campaign.program import TINY_MODEL, command, environment, judge, run, shell_code
from campaign.record import Record

STEPS = 300
SETTINGS = f"--train.steps {STEPS} --train.checkpoint_every 5 --train.eval_every 100 --train.eval_stories 4".split()
START_SECONDS = 120.0


def kill(record: Record, work: Path, *, kills: int, seed: int, plant: str | None) -> None:
    """Kill and resume runs until there have been `kills` kills; each finished run is compared with a straight one."""
    base = valid_files.build(work)
    folder = work / "kill"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = random.Random(seed)
    train = ["train", "--data", base / "data", *TINY_MODEL, *SETTINGS]
    started_at = time.monotonic()
    code, stderr = run(work, *train, "--out", folder / "straight")
    assert code == 0, stderr
    straight_seconds = time.monotonic() - started_at
    expected = (folder / "straight" / "model.safetensors").read_bytes()
    while record.counts["kills"] < kills:
        run_number = record.counts["runs"]
        out = folder / f"run-{run_number}"
        # Half of the runs are killed often, so that they advance by a few checkpoints at a time.
        longest = rng.choice([0.3, 1.5]) * straight_seconds
        problem = None
        while problem is None:
            words = [*train, "--out", out, *(["--resume"] if (out / "config.toml").exists() else [])]
            seconds = rng.uniform(0.0, longest) if record.counts["kills"] < kills else None
            code, stderr = run_until(work, words, seconds, rng, out, plant)
            if code != 128 + signal.SIGKILL:
                problem = judge(code, stderr) or (f"exit code {code}" if code else None)
                break
            record.counts["kills"] += 1
        if problem is None and (out / "model.safetensors").read_bytes() != expected:
            problem = "the final weights differ from those of a straight run"
        if problem is None and (leftovers := [str(path) for path in out.rglob("*.draft")]):
            problem = f"left behind: {leftovers}"
        record.counts["runs"] += 1
        if problem:
            finding = record.add_finding(f"run-{run_number}", problem, seed=seed)
            (finding / "output").write_text(stderr)
            shutil.copytree(out, finding / "run", dirs_exist_ok=True)
        shutil.rmtree(out)


def run_until(
    work: Path, words: list[object], seconds: float | None, rng: random.Random, out: Path, plant: str | None
) -> tuple[int, str]:
    """Run a command and kill it `seconds` after its start (None: never); return its exit code and stderr.

    Every other kill waits for a draft of a checkpoint and comes within milliseconds, while it is being written.
    """
    process = subprocess.Popen(
        command(*words, plant=plant), cwd=work, env=environment(work), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if seconds is not None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            if rng.random() < 0.5:
                wait_for_draft(process, out)
                time.sleep(rng.uniform(0.0, 0.01))
            process.kill()
    _, stderr = process.communicate(timeout=600)
    return shell_code(process.returncode), stderr.decode(errors="replace")


def wait_for_draft(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait until a checkpoint is being written, or the process has ended."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if any((out / "checkpoints").glob("*.draft")):
            return
        time.sleep(0.0005)
