"""SIGINT and SIGTERM at random moments of every command, also while it starts."""

import dataclasses
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from campaign import base as valid_files
from campaign.full_disk import TRAIN, split, start
from campaign.outputs import check_model, check_run, list_checkpoints
from campaign.program import TRACEBACK, command, environment, judge, shell_code
from campaign.record import Record

GRACE_SECONDS = 60.0  # from the signal to the end of the process
START_UP_SECONDS = 0.35


@dataclasses.dataclass(frozen=True)
class Case:
    """A command to interrupt. With `endless` it must not end by itself, so that ignoring a signal is noticed."""

    words: str
    copies: tuple[str, ...] = ()
    run: str = ""  # a run directory, whose checkpoints must be whole
    outputs: tuple[str, ...] = ()  # model directories or files, absent, unchanged or (models) whole
    endless: bool = False


CASES = {
    "train": Case(f"{TRAIN} --train.steps 1000000", run="run", endless=True),
    "resume": Case(f"{TRAIN} --train.steps 1000000 --resume", copies=("run",), run="run", endless=True),
    "sweep": Case(
        f"sweep --data BASE/data --out sweep --trials 1000 {' '.join(TRAIN.split()[5:])} --train.steps 2"
        " --optim.learning_rate 1e-3:1e-2:log",
        endless=True,
    ),
    "generate": Case("generate BASE/model --num 1000000 --out stories.txt", endless=True),
    "generate-bundled": Case("generate --max-tokens 50"),
    "prepare": Case("prepare sample --tokenizer bpe:4096 --out data", outputs=("data/meta.json",)),
    "eval": Case("eval BASE/model --data BASE/data --engine cpu"),
    "eval-torch": Case("eval BASE/model --data BASE/data --engine torch"),
    "info": Case("info BASE/model"),
    "quantize": Case("quantize model --precision int8 --precision int4", copies=("model",), outputs=("model",)),
    "quantize-out": Case("quantize BASE/model --out int8-copy", outputs=("int8-copy",)),
    "export": Case("export BASE/model --format hf --out hf", outputs=("hf/model.safetensors",)),
    "export-over": Case("export BASE/model --format hf --out hf-gpt2 --force", copies=("hf-gpt2",)),
    "import": Case("import BASE/hf-llama --out model --force", copies=("model",), outputs=("model",)),
    "help": Case("train --help"),
}


def signals(record: Record, work: Path, names: list[str], *, moments: int, seed: int, plant: str | None) -> None:
    """Send each signal at `moments` random moments of each command; a third of them in its start."""
    base = valid_files.build(work)
    rng = random.Random(seed)
    for name in names or sorted(CASES):
        case = CASES[name]
        folder = work / "signals" / name
        start(folder, case, base)  # type: ignore[arg-type]
        began = time.monotonic()
        if not case.endless:
            subprocess.run(
                command(*split(case.words, base)), cwd=folder, env=environment(work), capture_output=True, check=True
            )
        length = time.monotonic() - began if not case.endless else 15.0
        for number in (signal.SIGINT, signal.SIGTERM):
            for moment in range(moments):
                seconds = rng.uniform(0.0, START_UP_SECONDS if moment % 3 == 0 else length)
                interrupt(record, work, base, folder, name, number, seconds, plant)
        shutil.rmtree(folder)


def interrupt(
    record: Record,
    work: Path,
    base: Path,
    folder: Path,
    name: str,
    number: signal.Signals,
    seconds: float,
    plant: str | None,
) -> None:
    """Start a command, send a signal after `seconds`, and check its end and what it leaves."""
    case = CASES[name]
    start(folder, case, base)  # type: ignore[arg-type]
    checkpoints = list_checkpoints(folder / case.run) if case.run else set()
    code, stderr, seconds_to_end = run_and_signal(work, folder, split(case.words, base), number, seconds, plant)
    record.counts["signals"] += 1
    record.counts[f"{name} {number.name} code {code}"] += 1
    if code is None:
        problem: str | None = f"still running {GRACE_SECONDS:.0f} s after {number.name}"
    else:
        problem = judge(code, stderr)
        if problem and is_start_of_interpreter(stderr):
            record.counts["before the program's first line"] += 1
            problem = None
        if problem is None and code == 0 and case.endless:
            problem = f"{number.name} was ignored"
    problem = problem or check_files(case, folder, checkpoints)
    if problem:
        finding = record.add_finding(
            f"{name}-{number.name}-{record.counts['signals']}",
            problem,
            seconds=round(seconds, 3),
            ended_after=round(seconds_to_end, 3),
            code=code,
            words=case.words,
        )
        (finding / "output").write_text(stderr)


def run_and_signal(
    work: Path, folder: Path, words: list[str], number: signal.Signals, seconds: float, plant: str | None
) -> tuple[int | None, str, float]:
    """Run a command and signal it after `seconds`; return its exit code, its stderr, and how many seconds it went on.

    The exit code is None if it had to be killed.
    """
    process = subprocess.Popen(
        command(*words, plant=plant),
        cwd=folder,
        env=environment(work),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the signal is for this process alone, as from a scheduler
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    sent_at = time.monotonic()
    code: int | None = None
    try:
        _, output = process.communicate(timeout=GRACE_SECONDS)
        code = shell_code(process.returncode)
    except subprocess.TimeoutExpired:
        process.kill()
        _, output = process.communicate()
    return code, output.decode(errors="replace"), time.monotonic() - sent_at


def check_files(case: Case, folder: Path, checkpoints: set[str]) -> str | None:
    """Return what is wrong with the files that a command left, or None."""
    if case.run:
        return check_run(folder / case.run, checkpoints)
    for name in case.outputs:
        if (folder / name / "config.json").exists() and (problem := check_model(folder / name)):
            return problem
    for name in case.copies:
        if not (folder / name / "config.json").exists():
            return f"{name} is gone"
    return None


def is_start_of_interpreter(stderr: str) -> bool:
    """Whether a traceback has no frame inside the package: Python itself was still starting, or already ending."""
    text = stderr.rpartition(TRACEBACK)[2]
    return not re.search(r"/tinystories/|/campaign/", text)
