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
from campaign.outputs import check_model, check_run, digest, list_checkpoints
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
    before = {path: digest(folder / path) for path in case.copies}
    process = subprocess.Popen(
        command(*split(case.words, base), plant=plant),
        cwd=folder,
        env=environment(work),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the signal is for this process alone, as from a scheduler
    )
    problem = None
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    sent_at = time.monotonic()
    try:
        _, output = process.communicate(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, output = process.communicate()
        problem = f"still running {GRACE_SECONDS:.0f} s after {number.name}"
    stderr = output.decode(errors="replace")
    code = shell_code(process.returncode)
    record.counts["signals"] += 1
    record.counts[f"{name} {number.name} code {code}"] += 1
    if problem is None:
        problem = judge(code, stderr)
        if problem and is_start_of_interpreter(stderr):
            record.counts["before the program's first line"] += 1
            problem = None
    if problem is None and code == 0 and case.endless:
        problem = f"{number.name} was ignored"
    if problem is None and case.run:
        problem = check_run(folder / case.run, checkpoints)
    for output_name in case.outputs:
        path = folder / output_name
        if problem is None and (path / "config.json").exists():
            problem = check_model(path)
    for copy, old in before.items():
        if problem is None and not case.run and not (folder / copy / "config.json").exists():
            problem = f"{copy} is gone (it was {old[:8]})"
    if problem:
        finding = record.add_finding(
            f"{name}-{number.name}-{record.counts['signals']}",
            problem,
            seconds=round(seconds, 3),
            ended_after=round(time.monotonic() - sent_at, 3),
            code=code,
            words=case.words,
        )
        (finding / "output").write_text(stderr)


def is_start_of_interpreter(stderr: str) -> bool:
    """Whether a traceback has no frame inside the package: Python itself was still starting, or already ending."""
    text = stderr.rpartition(TRACEBACK)[2]
    return not re.search(r"/tinystories/|/campaign/", text)
