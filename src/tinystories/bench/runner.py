"""Benchmark runner: programs take turns at the same task, each in its own process, so that none disturbs another."""

import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinystories.bench.competitors import Prompts, Workload
from tinystories.bench.setup import Competitor
from tinystories.errors import UserError

log = logging.getLogger(__name__)


def child_command(competitor: Competitor, folder: Path, workload: Workload) -> list[str]:
    """Return the command that runs a competitor with the files in `folder`."""
    program = [sys.executable, "-m", "tinystories.bench.competitors", competitor.name, competitor.precision]
    settings = dataclasses.asdict(dataclasses.replace(workload, shortlist=competitor.shortlist))
    return [*program, str(folder), json.dumps(settings)]


def last_line(stderr: str) -> str:
    """Return the last line that a program wrote to stderr: usually its error."""
    return (stderr.strip().splitlines() or ["it printed no error"])[-1]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every program generates: `tokens` ids after each of `streams` prompts of `prompt_tokens` random ids."""

    name: str
    streams: int
    prompt_tokens: int
    tokens: int
    counted_tokens: int  # of all streams together; divided by the seconds, they are the tokens/s


class BenchProcess:
    """The child process of one program; it idles between its turns. Constructing it waits until the model is loaded."""

    def __init__(self, competitor: Competitor, folder: Path, workload: Workload) -> None:
        self.competitor = competitor
        self.stderr_file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = child_command(competitor, folder, workload)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr_file, text=True
        )
        try:
            self.read_reply()
        except BaseException:
            self.close()
            raise

    def read_reply(self) -> Any:
        """Read one JSON line; `UserError` with the last line of stderr if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.stderr_file.seek(0)
            raise UserError(f"{self.competitor} stopped: {last_line(self.stderr_file.read())}")
        return json.loads(line)

    def generate(self, prompts: Prompts, tokens: int) -> Any:
        """Decode `tokens` ids for each prompt; return {"seconds", "cpu_seconds", "ids", "peak_mb"}."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `read_reply` reports why the process ended
        return self.read_reply()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.stderr_file):
            if pipe is not None:
                pipe.close()


@dataclasses.dataclass
class Measurement:
    """What one program achieved at one task."""

    process: BenchProcess
    rates: list[float] = dataclasses.field(default_factory=list)  # tokens/s, one per round
    ids: Prompts = dataclasses.field(default_factory=list)
    peak_mb: float | None = None

    @property
    def competitor(self) -> Competitor:
        return self.process.competitor

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def speedup_over(self, other: "Measurement") -> float:
        """Return the median over rounds of the ratio of the two rates measured in the same round."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))

    def same_ids(self, reference: "Measurement") -> float:
        """Return the share of the new ids before the first that differs from the reference's, over all streams."""
        n_matching = 0
        for ids, reference_ids in zip(self.ids, reference.ids, strict=True):
            mismatches = (i for i, (a, b) in enumerate(zip(ids, reference_ids, strict=True)) if a != b)
            n_matching += next(mismatches, len(reference_ids))
        return n_matching / sum(map(len, reference.ids))


def run_rounds(
    processes: Sequence[BenchProcess], task: Task, prompts: Prompts, runs: int, *, by_cpu_seconds: bool = False
) -> list[Measurement]:
    """Run one warm-up round and `runs` measured ones of a task; every process has one turn per round.

    Rates are tokens per second, of processor time if `by_cpu_seconds`.
    """
    unit = "cpu_seconds" if by_cpu_seconds else "seconds"
    measurements = [Measurement(process) for process in processes]
    for i in range(runs + 1):
        log.info("%s: %s", task.name, f"round {i} of {runs}" if i else "warming up")
        for measurement in measurements:
            reply = measurement.process.generate(prompts, task.tokens)
            measurement.ids, measurement.peak_mb = reply["ids"], reply["peak_mb"]
            if i:
                measurement.rates.append(task.counted_tokens / reply[unit])
    return measurements


def time_startup(commands: dict[str, tuple[list[str], str]], runs: int) -> dict[str, list[float]]:
    """Return the seconds of each run of each command, (command line, text on stdin) by label, after a warm-up round.

    `UserError` with the last line of stderr if one fails.
    """
    seconds: dict[str, list[float]] = {label: [] for label in commands}
    for i in range(runs + 1):
        log.info(f"round {i} of {runs}" if i else "warming up")
        for label, (command, stdin) in commands.items():
            started_at = time.perf_counter()
            completed = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
            if completed.returncode:
                raise UserError(f"{label} stopped: {last_line(completed.stderr)}")
            if i:
                seconds[label].append(time.perf_counter() - started_at)
    return seconds


def speed_ratios(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return the median speedups by label, "ours / other".

    They are ours over each competitor with weights of the same precision, a shortlist over the full vocabulary, and our
    fastest over the fastest competitor. TorchEngine counts as neither.
    """
    ours = [m for m in measurements if m.competitor.name == "tinystories"]
    competitors = [m for m in measurements if m.competitor.name not in ("tinystories", "torch")]
    full_vocabulary = [m for m in ours if not m.competitor.shortlist]
    ratios = {
        f"{a.competitor} / {b.competitor}": a.speedup_over(b)
        for b in competitors + full_vocabulary
        for a in ours
        if (b in competitors and a.competitor.precision.removesuffix("-a8") == b.competitor.precision)
        or (b in ours and a.competitor.shortlist and a.competitor.precision == b.competitor.precision)
    }
    if ours and competitors:
        best, rival = (max(group, key=lambda m: m.median) for group in (ours, competitors))
        ratios[f"fastest: {best.competitor} / {rival.competitor}"] = best.speedup_over(rival)
    return ratios
