"""Benchmark runner: programs take turns at the same task, each in its own process, so that none disturbs another."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinystories.bench.competitors import Prompts, Workload
from tinystories.errors import UserError


class BenchProcess:
    """The child process of one program; it idles between its turns. Constructing it waits until the model is loaded."""

    def __init__(self, name: str, precision: str, folder: Path, workload: Workload) -> None:
        self.name, self.precision, self.shortlist = name, precision, workload.shortlist
        self.label = f"{name} {precision}" + (f", {workload.shortlist:,} ids" if workload.shortlist else "")
        self.stderr_file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "tinystories.bench.competitors", name, precision, str(folder)]
        self.process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(workload))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr_file,
            text=True,
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
            last_line = (self.stderr_file.read().strip().splitlines() or ["it printed no error"])[-1]
            raise UserError(f"{self.label} stopped: {last_line}")
        return json.loads(line)

    def generate(self, prompts: Prompts, tokens: int) -> Any:
        """Decode `tokens` ids for each prompt; return {"seconds", "ids", "peak_mb"}."""
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
    rates: list[float]  # tokens/s, one per round
    ids: Prompts
    peak_mb: float | None

    @property
    def label(self) -> str:
        return self.process.label

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def speedup_over(self, other: "Measurement") -> float:
        """Return the median over rounds of the ratio of the two rates measured in the same round."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def run_rounds(
    processes: Sequence[BenchProcess],
    prompts: Prompts,
    tokens: int,
    runs: int,
    *,
    counted_tokens: int,
    report: Callable[[str], None],
) -> list[Measurement]:
    """Run one warm-up round and `runs` measured ones; every process has one turn per round.

    `counted_tokens`: the tokens credited to a turn, from which its rate in tokens/s is computed.
    """
    measurements = [Measurement(c, [], [], None) for c in processes]
    for i in range(runs + 1):
        report(f"round {i} of {runs}" if i else "warming up")
        for process, measurement in zip(processes, measurements, strict=True):
            reply = process.generate(prompts, tokens)
            measurement.ids, measurement.peak_mb = reply["ids"], reply["peak_mb"]
            if i:
                measurement.rates.append(counted_tokens / reply["seconds"])
    return measurements


def matching_prefix(measurement: Measurement, reference: Measurement) -> int:
    """Count the new ids that equal the reference's, up to the first mismatch of each stream, summed over streams."""
    n_matching = 0
    for ids, reference_ids in zip(measurement.ids, reference.ids, strict=True):
        mismatches = (i for i, (a, b) in enumerate(zip(ids, reference_ids, strict=True)) if a != b)
        n_matching += next(mismatches, len(reference_ids))
    return n_matching


def speed_ratios(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Return the median speedups by label, "ours / other".

    They are ours over each competitor of the same precision, a shortlist over the full vocabulary, and our fastest over
    the fastest competitor. TorchEngine counts as neither.
    """
    ours = [s for s in measurements if s.process.name == "tinystories"]
    competitors = [s for s in measurements if s.process.name not in ("tinystories", "torch")]
    full_vocabulary = [s for s in ours if not s.process.shortlist]
    ratios = {
        f"{a.label} / {b.label}": a.speedup_over(b)
        for b in competitors + full_vocabulary
        for a in ours
        if a.process.precision == b.process.precision and (a.process.shortlist or b in competitors)
    }
    if ours and competitors:
        best, rival = (max(group, key=lambda s: s.median) for group in (ours, competitors))
        ratios[f"fastest: {best.label} / {rival.label}"] = best.speedup_over(rival)
    return ratios
