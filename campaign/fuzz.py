"""Damaged files: every input must give a result or a user error, in 20 seconds and bounded memory."""

import dataclasses
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaign import base as valid_files
from campaign.program import TRACEBACK, environment, shell_code
from campaign.readers import READERS
from campaign.record import Record

HEADROOM_BYTES = 1 << 30
SAVED_PER_PLACE = 3  # inputs saved for each place in the source that fails
START_SECONDS = 180.0  # a worker imports everything and reads the valid files first


def fuzz(
    record: Record, work: Path, reader: str, *, seed: int, first: int, count: int, seconds: float, plant: str | None
) -> None:
    """Read inputs `first` to `first + count` of a reader, until the time is used up."""
    base = valid_files.build(work)
    attack = Attack(
        record,
        work,
        base,
        scratch=work / f"scratch-{os.getpid()}-{reader}",
        reader=reader,
        seed=seed,
        stop=first + count,
        deadline=time.monotonic() + seconds,
        plant=plant,
    )
    number = first
    while number < attack.stop and time.monotonic() < attack.deadline:
        number = run_worker(attack, number)
    shutil.rmtree(attack.scratch, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Attack:
    """One reader and the inputs that it gets."""

    record: Record
    work: Path
    base: Path  # valid files
    scratch: Path  # the input at hand and what the program wrote
    reader: str
    seed: int
    stop: int  # number after the last input
    deadline: float  # of time.monotonic()
    plant: str | None


def run_worker(attack: Attack, number: int) -> int:
    """Read inputs in one process until it ends or dies; return the number of the next input."""
    words = [
        attack.reader, attack.seed, number, attack.stop, attack.base, attack.scratch, HEADROOM_BYTES,
        attack.plant or "",
    ]  # fmt: skip
    attack.scratch.mkdir(parents=True, exist_ok=True)
    with (
        (attack.scratch / "worker-stderr").open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "campaign.worker", *map(str, words)],
            cwd=attack.base,  # the sweep's data has a relative path
            env=environment(attack.work),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        try:
            return watch(attack, number, process)
        finally:
            process.kill()  # unless it has ended


def watch(attack: Attack, number: int, process: subprocess.Popen[bytes]) -> int:
    """Record what a worker reports until it ends, hangs or the time is used up; return the number of the next input."""
    record, timeout = attack.record, READERS[attack.reader].timeout
    current: dict[str, Any] = {}
    for event in read_events(process, START_SECONDS, timeout):
        if event is None:
            save(attack, current, f"no answer within {timeout:.0f} s", read_stderr(attack.scratch))
            return int(current["start"]) + 1
        if "start" in event:
            current = event
            continue
        record.counts["inputs"] += 1
        record.counts[f"{attack.reader} code {event['codes'][-1]}"] += 1
        if event["problem"]:
            save(attack, current, event["problem"], event["output"])
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        number, current = event["done"] + 1, {}
        if time.monotonic() > attack.deadline:
            return attack.stop
    code = shell_code(process.wait())
    if current:
        save(attack, current, f"the process died: exit code {code}", read_stderr(attack.scratch))
        return int(current["start"]) + 1
    if code:
        errors = (attack.scratch / "worker-stderr").read_text() + read_stderr(attack.scratch)
        raise SystemExit(f"campaign: the worker failed with {code}:\n{errors}")
    return number


def read_events(process: subprocess.Popen[bytes], first: float, timeout: float) -> Iterator[dict[str, Any] | None]:
    """Yield what a worker reports; None if it is silent for `timeout` seconds (before its first report: `first`)."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    buffered, wait = b"", first
    while True:
        if not selector.select(wait):
            yield None
            return
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return
        wait = timeout
        *lines, buffered = (buffered + piece).split(b"\n")
        for line in lines:
            yield json.loads(line)


def read_stderr(scratch: Path) -> str:
    path = scratch / "stderr"
    return path.read_bytes()[-20_000:].decode(errors="replace") if path.exists() else ""


def save(attack: Attack, current: dict[str, Any], problem: str, output: str) -> None:
    """Record a finding, with the input and the output of the program."""
    if not current:
        raise SystemExit(f"campaign: the worker stopped while it read valid files: {problem}\n{output}")
    number, counts = current["start"], attack.record.counts
    counts["inputs with a finding"] += 1
    place = locate(output)
    signature = f"finding {attack.reader}: {problem if place is None else place}"
    counts[signature] += 1
    if counts[signature] > SAVED_PER_PLACE:
        return
    folder = attack.record.add_finding(
        f"{attack.reader}-{attack.seed}-{number}",
        problem,
        place=place,
        damage=current["damage"],
        actions=current["actions"],
        replay=f"python -m campaign fuzz --reader {attack.reader} --seed {attack.seed} --replay {number}",
    )
    (folder / "output").write_text(output)
    shutil.rmtree(folder / "input", ignore_errors=True)
    shutil.copytree(attack.scratch / "in", folder / "input", symlinks=True, ignore=only_regular)


def locate(output: str) -> str | None:
    """Return the innermost frame inside the package and the type of the exception, if the output has a traceback."""
    text = output.rpartition(TRACEBACK)[2]
    frames = re.findall(r'File "[^"]*/tinystories/([^"]+)", line (\d+), in (\S+)', text)
    types = re.findall(r"^([\w.]+)(?::|$)", text, re.MULTILINE)
    return f"{types[-1] if types else 'crash'} in {frames[-1][0]}:{frames[-1][1]} {frames[-1][2]}" if frames else None


def only_regular(folder: str, names: list[str]) -> list[str]:
    """Return what cannot be copied: pipes, and links to devices."""
    paths = {name: Path(folder) / name for name in names}
    return [name for name, path in paths.items() if not path.is_file() and not path.is_dir() and not path.is_symlink()]
