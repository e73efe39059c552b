"""Programs that take turns at the same task, each in a process of its own, so that none disturbs another."""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinystories.errors import UserError
from tinystories.interop.peers import Prompts, Room


class Contestant:
    """A peer's process, which waits between its turns."""

    def __init__(self, name: str, precision: str, folder: Path, room: Room) -> None:
        self.name, self.precision, self.shortlist = name, precision, room.shortlist
        self.label = f"{name} {precision}" + (f", {room.shortlist:,} ids" if room.shortlist else "")
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "tinystories.interop.peers", name, precision, str(folder)]
        self.process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(room))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        try:
            self.answer()
        except BaseException:
            self.close()
            raise

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{self.label} stopped: {last}")
        return json.loads(line)

    def write(self, prompts: Prompts, tokens: int) -> Any:
        """`seconds`, `ids` and `peak_mb` of one turn."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` tells why
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                pipe.close()


@dataclasses.dataclass
class Score:
    """Of one contestant at one task."""

    who: Contestant
    rates: list[float]  # tokens/s of each round
    ids: Prompts
    peak_mb: float | None

    @property
    def label(self) -> str:
        return self.who.label

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def over(self, other: "Score") -> float:
        """Median over the rounds of the ratio of both rates, which stood side by side."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def rounds(
    contestants: Sequence[Contestant],
    prompts: Prompts,
    tokens: int,
    runs: int,
    *,
    counted: int,
    tell: Callable[[str], None],
) -> list[Score]:
    """`runs` rounds in which each has its turn, after one that warms up. A turn counts as `counted` tokens."""
    scores = [Score(c, [], [], None) for c in contestants]
    for i in range(runs + 1):
        tell(f"round {i} of {runs}" if i else "warming up")
        for contestant, score in zip(contestants, scores, strict=True):
            turn = contestant.write(prompts, tokens)
            score.ids, score.peak_mb = turn["ids"], turn["peak_mb"]
            if i:
                score.rates.append(counted / turn["seconds"])
    return scores


def agreement(score: Score, reference: Score) -> int:
    """New ids that are those of the reference, up to the first that differs, in all streams."""
    total = 0
    for ours, theirs in zip(score.ids, reference.ids, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        total += next(differ, len(theirs))
    return total


def pairs(scores: Sequence[Score]) -> dict[str, float]:
    """Ours over each peer of the same precision, a shortlist over all ids, and our fastest over the fastest peer."""
    ours = [s for s in scores if s.who.name == "tinystories"]
    peers = [s for s in scores if s.who.name not in ("tinystories", "torch")]
    of_all_ids = [s for s in ours if not s.who.shortlist]
    found = {
        f"{a.label} / {b.label}": a.over(b)
        for b in peers + of_all_ids
        for a in ours
        if a.who.precision == b.who.precision and (a.who.shortlist or b in peers)
    }
    if ours and peers:
        best, rival = (max(them, key=lambda s: s.median) for them in (ours, peers))
        found[f"fastest: {best.label} / {rival.label}"] = best.over(rival)
    return found
