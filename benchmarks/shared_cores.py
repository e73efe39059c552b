"""The CPU engine on cores that it shares: two `generate` at once, and the default number of threads on busy cores.

    python benchmarks/shared_cores.py                    # on a machine that does nothing else
    python benchmarks/shared_cores.py --model seed-89m   # a model directory of your own

`two`: the tokens/s of each of two `generate` that run at the same time, over those of one alone (goal: each 0.45).
`default`: with one busy process on every core, the tokens/s of the default number of threads over those of the best of
`--threads 1..n` (goal: 0.8), in turns. Prints medians over rounds, then a JSON line.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from script import run_main

from tinystories.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; the bundled model by default")
    parser.add_argument("--tokens", type=int, default=2000, help="of a story")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = ["generate", *filter(None, [options.model]), "--ignore-end", "--max-tokens", str(options.tokens)]
    rate(start(words))  # a warm-up
    two = []
    for _ in range(options.rounds):
        alone = rate(start(words))
        both = [start(words), start(words)]
        two.append(min(rate(process) for process in both) / alone)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_cores)]
    try:
        default, rates = measure_default(words, options.rounds, n_cores)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"two at once: the slower has {statistics.median(two):.2f} of one alone (goal 0.45)")
    print(f"the default has {default:.2f} of the best number of threads (goal 0.8), tokens/s {rates}")
    print(json.dumps({"benchmark": "shared_cores", "two": two, "default": default, "rates": rates}))


def measure_default(words: list[str], n_rounds: int, n_cores: int) -> tuple[float, dict[str, int]]:
    """Return the median ratio of the default to the fastest number of threads, and the median rates of all."""
    settings = {"default": []} | {str(n): ["--threads", str(n)] for n in range(1, n_cores + 1)}
    rounds = [{name: rate(start([*words, *extra])) for name, extra in settings.items()} for _ in range(n_rounds)]
    medians = {name: round(statistics.median(row[name] for row in rounds)) for name in settings}
    ratios = [row["default"] / max(value for name, value in row.items() if name != "default") for row in rounds]
    return statistics.median(ratios), medians


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "tinystories", *words, "--no-stream"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rate(process: subprocess.Popen[str]) -> float:
    """Wait for a `generate` and return the tokens/s that it prints."""
    _, errors = process.communicate()
    found = re.search(r"tokens, ([\d,.]+) tokens/s", errors)
    if found is None:
        raise UserError(f"no tokens/s in {errors.strip()!r}")
    return float(found.group(1).replace(",", ""))


if __name__ == "__main__":
    run_main(main)
