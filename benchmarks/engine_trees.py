"""The CPU engine of two checkouts, one thread: a prompt of 256 tokens, one greedy stream, 32 streams.

    python benchmarks/engine_trees.py --base ../base --precision int8 --rounds 9

Both run in processes of their own, with the bundled model of their own tree, and take turns at each task. Prints the
medians of the tokens/s and of the ratios of each turn. Results are in results/2026-11-27-cpu-attention.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys, time, numpy as np, tinystories
engine = tinystories.load(engine="cpu", precision=sys.argv[1], threads=1, n_slots=32).engine
ids = np.random.default_rng(0).integers(0, 4096, 256)

def prompt():
    for _ in range(6): engine.prefill(0, ids)
    return 6 * 256

def stream():
    logits = engine.prefill(0, ids[:16])
    for _ in range(150): logits = engine.step([0], [int(logits.argmax())])[0]
    return 150

def streams():
    next_ids = [int(engine.prefill(slot, ids[slot : slot + 16]).argmax()) for slot in range(32)]
    for _ in range(24): next_ids = engine.step(range(32), next_ids).argmax(axis=1).tolist()
    return 32 * 24

print("ready", flush=True)
for line in sys.stdin:
    started_at = time.perf_counter()
    print(globals()[line.strip()]() / (time.perf_counter() - started_at), flush=True)
"""


def start(tree: Path, precision: str, cache: str) -> "subprocess.Popen[str]":
    """Start the worker of a tree and wait until its model is loaded."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "TINYSTORIES_CACHE": cache}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", WORKER, precision], text=True, env=environment, **pipes)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        sys.exit(f"{tree}: the worker did not start")
    return process


def measure(process: "subprocess.Popen[str]", task: str) -> float:
    """Return the tokens/s of a task."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{task}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="another checkout")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workers = [start(tree, options.precision, f"{folder}/{i}") for i, tree in enumerate((options.base, ROOT))]
        for task in ("prompt", "stream", "streams"):
            rounds = [[measure(worker, task) for worker in workers] for _ in range(options.rounds + 1)][1:]
            base, ours = (statistics.median(rates) for rates in zip(*rounds, strict=True))
            ratio = statistics.median(after / before for before, after in rounds)
            print(f"{options.precision} {task}: {base:,.0f} -> {ours:,.0f} tokens/s, {ratio:.2f}", flush=True)
        for worker in workers:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()
