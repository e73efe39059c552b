"""How much of the CPU engine's speed is left for stories, with the bundled model, its sampling settings and one thread.

    python benchmarks/generation.py --rounds 9 --base ../other-tree/src

For 1, 8 and 64 slots:

* `step`: the engine's own prefill and steps, all slots in use;
* `stories`: as many tokens of stories, with sampling, stop rules, detokenizing and events;
* `ended`: 64 stories that end by themselves in 8 slots, which is what `tinystories generate --num 64` does;
* `loop`: stories from an engine that computes nothing but returns recorded logits: what generation itself costs.

With `--base`, another source tree is measured too. All measurements take turns, each tree in a process of its own. Time
is processor time, so that other programs matter less. Prints medians in microseconds per token, the share of the
engine's speed and the ratio to the base, then a JSON line.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from script import run_main

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.engine.engine_config import EngineConfig
from tinystories.generate.batching import Request, Story, generate_all
from tinystories.generate.storyteller import Storyteller

N_TOKENS = 128  # of a story, and of a slot
NAMES = {1: ("step", "stories", "loop"), 8: ("step", "stories", "ended", "loop"), 64: ("step", "stories", "loop")}


class ReplayEngine:
    """An engine that returns recorded logits of full steps, one after the other; it samples as the original does."""

    def __init__(self, engine: Any, logits: list[Any]) -> None:
        self.config, self.n_slots, self.logprobs = engine.config, engine.n_slots, engine.logprobs
        self.logits = itertools.cycle(logits)
        if hasattr(engine, "sample"):
            self.sample = engine.sample

    def prefill(self, slot: int, _ids: Any) -> Any:
        return next(self.logits)[slot]

    def step(self, slots: Any, _ids: Any) -> Any:
        return next(self.logits)[: len(slots)]

    def free(self, slot: int) -> None:
        pass


class Measurements:
    """What is measured with one number of slots. Each method returns microseconds per token."""

    def __init__(self, n_slots: int) -> None:
        config = EngineConfig(engine="cpu", threads=1, n_slots=n_slots)
        self.storyteller = Storyteller.load(BUNDLED_MODEL, config)
        self.engine: Any = self.storyteller.engine
        self.slots = list(range(n_slots))
        ids = [story.ids for story in self.generate(self.engine, n_slots, N_TOKENS)]
        self.step_ids = [list(row) for row in zip(*ids, strict=True)]  # one id of each slot for each step
        self.replay = ReplayEngine(self.engine, self.run_steps())

    def generate(self, engine: Any, n_stories: int, max_tokens: int, *, ignore_end: bool = True) -> list[Story]:
        settings = self.storyteller.settings
        requests = [
            Request(settings=settings, seed=1, number=number, max_tokens=max_tokens, ignore_end=ignore_end)
            for number in range(n_stories)
        ]
        return generate_all(engine, self.storyteller.tokenizer, requests)

    def run_steps(self) -> list[Any]:
        """Return the logits of all steps."""
        for slot in self.slots:
            self.engine.prefill(slot, [self.storyteller.tokenizer.end_id])
        return [self.engine.step(self.slots, ids) for ids in self.step_ids[1:]]

    def measure(self, name: str) -> float:
        started_at = time.process_time()
        if name == "step":
            self.run_steps()
            n_tokens = N_TOKENS * len(self.slots)
        elif name == "ended":
            n_tokens = sum(story.n_generated for story in self.generate(self.engine, 64, 400, ignore_end=False))
        else:
            engine = self.replay if name == "loop" else self.engine
            n_tokens = sum(story.n_generated for story in self.generate(engine, len(self.slots), N_TOKENS))
        return 1e6 * (time.process_time() - started_at) / n_tokens


class Tree:
    """A process that measures one source tree."""

    def __init__(self, source: str) -> None:
        environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def measure(self, n_slots: int, name: str) -> float:
        assert self.process.stdin
        assert self.process.stdout
        print(n_slots, name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def serve() -> None:
    """Measure what each line of stdin names."""
    measurements = {n_slots: Measurements(n_slots) for n_slots in NAMES}
    for line in sys.stdin:
        n_slots, name = line.split()
        print(measurements[int(n_slots)].measure(name), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--base", type=Path, help="src folder of another commit")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    trees = {"ours": Tree(str(Path(__file__).parents[1] / "src"))}
    if options.base:
        trees["base"] = Tree(str(options.base.resolve()))
    rounds: dict[str, dict[tuple[int, str], list[float]]] = {tree: {} for tree in trees}
    for number in range(options.rounds + 1):
        for n_slots, names in NAMES.items():
            for name in names:
                for tree_name, tree in trees.items():
                    microseconds = tree.measure(n_slots, name)
                    if number:  # the first round is a warmup
                        rounds[tree_name].setdefault((n_slots, name), []).append(microseconds)
    report(rounds)


def report(rounds: dict[str, dict[tuple[int, str], list[float]]]) -> None:
    """Print the results of all rounds."""
    results: dict[str, dict[str, float]] = {}
    for tree, measured in rounds.items():
        for (n_slots, name), times in measured.items():
            share = median_ratio(measured[n_slots, "step"], times)
            ratio = median_ratio(rounds["base"][n_slots, name], times) if "base" in rounds else 1.0
            print(
                f"{tree} {n_slots:3} {name:8} {statistics.median(times):8.2f} us/token; {share:7.3f} of the speed of"
                f" step, {ratio:6.2f} of the base"
            )
            results[f"{tree}, {n_slots}, {name}"] = {
                "us_per_token": round(statistics.median(times), 2),
                "share_of_step": round(share, 3),
                "ratio_to_base": round(ratio, 2),
            }
    print(json.dumps({"benchmark": "generation", "tokens": N_TOKENS, "threads": 1, "results": results}))


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median over the rounds of how many times longer the numerators take."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    run_main(main)
