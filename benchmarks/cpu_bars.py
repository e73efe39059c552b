"""The CPU engine beside the first storyteller's commit and beside other programs: each goal, and what was reached.

    git worktree add ../first e574ec6
    python benchmarks/cpu_bars.py --base ../first --llama-avx2 ../llama-avx2/bin

`generate` of both commits tells stories with the weights of the first storyteller (5.1M parameters) and one thread, in
turns. Everything else is `tinystories bench` with all other programs that are installed, on those weights and on random
ones of modern-89m; for the ratios to the best other program, those of each of our precisions are printed beside the
fastest one's. With `--limits avx2` all programs are held to AVX2: ours by TINYSTORIES_CPU, CTranslate2 and PyTorch
by their variables, and llama.cpp by a library built without AVX-512 (`cmake -DGGML_NATIVE=OFF`), whose folder is
`--llama-avx2`. Ratios are medians over rounds. Prints a table for each limit, then a JSON line.
"""

import argparse
import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from script import run_main

from tinystories.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {
    "native": {},
    "avx2": {
        "TINYSTORIES_CPU": "avx2",
        "CT2_FORCE_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
MAX_STREAMS_MB = 420  # goal for 32 streams of modern-89m in int8


@dataclasses.dataclass(frozen=True)
class Bar:
    """A ratio to reach, and where it stands: `goals` by limit."""

    name: str
    goals: dict[str, float]
    reached: Callable[[dict[str, Any]], float]
    task: str = ""  # whose ratios of all our precisions to the best other program belong to the bar


def best_bar(name: str, goals: dict[str, float], task: str) -> Bar:
    """Our fastest row over the fastest of the other programs."""
    return Bar(name, goals, lambda result: max(ratios_to_best(result[task]["runs"]).values()), task)


def ratios_to_best(runs: dict[str, list[float]]) -> dict[str, float]:
    """Return for each of our precisions the ratio of its rates to those of the fastest other program."""
    rivals = [rates for name, rates in runs.items() if not name.startswith(("tinystories ", "torch "))]
    best = max(rivals, key=statistics.median)
    return {
        name.removeprefix("tinystories "): round(statistics.median(a / b for a, b in zip(rates, best, strict=True)), 3)
        for name, rates in runs.items()
        if name.startswith("tinystories ")
    }


def llama_ratio(precision: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result["decode"]["ratios"].get(
        f"tinystories {precision} / llama.cpp {precision}", float("nan")
    )


# (name, arguments of `tinystories bench`, bars)
BENCHES = (
    (
        "first storyteller, 1 thread",
        ["decode", "{model}", "--threads", "1"],
        (best_bar("prompt of 256 / best other program", {"native": 1.2, "avx2": 1.1}, "prefill"),),
    ),
    (
        "modern-89m, 1 thread",
        ["decode", "--threads", "1", "--tokens", "100"],
        (best_bar("prompt of 256 / best other program", {"native": 1.2, "avx2": 1.1}, "prefill"),),
    ),
    (
        "modern-89m, 2 threads",
        ["decode", "--threads", "2", "--tokens", "100"],
        (
            best_bar("prompt of 256 / best other program", {"native": 1.2, "avx2": 1.1}, "prefill"),
            Bar("one stream, int4 / llama.cpp Q4_0", {"native": 2.2, "avx2": 1.8}, llama_ratio("int4")),
            Bar("one stream, int8 / llama.cpp Q8_0", {"native": 2.0, "avx2": 1.5}, llama_ratio("int8")),
            Bar("one stream, fp32 / llama.cpp F32", {"native": 1.1, "avx2": 1.0}, llama_ratio("fp32")),
        ),
    ),
    (
        "modern-89m, 1 thread",
        ["batch", "--threads", "1"],
        (
            best_bar("32 streams / best other program", {"native": 1.8, "avx2": 1.5}, "batch"),
            Bar(
                f"32 streams, int8, {MAX_STREAMS_MB} MB / peak memory",
                {"native": 1.0, "avx2": 1.0},
                lambda result: MAX_STREAMS_MB / result["batch"]["peak_mb"]["tinystories int8"],
            ),
        ),
    ),
)
# (name, options of `tinystories generate`, our precision, goals)
STORIES = (
    ("generate, one stream / e574ec6", ["--ignore-end"], "int8", {"native": 2.5, "avx2": 1.5}),
    ("generate --num 64 / e574ec6", ["--num", "64"], "int8", {"native": 4.0, "avx2": 2.0}),
    ("generate --num 64, int8-a8 / e574ec6", ["--num", "64"], "int8-a8", {"native": 4.0, "avx2": 2.0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkout of e574ec6")
    parser.add_argument("--llama-avx2", type=Path, help="folder of llama.cpp's libraries built without AVX-512")
    parser.add_argument("--limits", default=",".join(LIMITS), help="comma-separated: native, avx2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count processor time, on a busy machine; leaves out two threads"
    )
    parser.add_argument("--only", default="", help="regular expression: only bars whose name it matches")
    options = parser.parse_args()
    model = options.base / "src" / "tinystories" / "bundled"
    if not model.is_dir():
        raise UserError(f"--base {options.base}: there is no {model}; give the root of a checkout of e574ec6")
    results = []
    for limit in options.limits.split(","):
        if limit not in LIMITS:
            raise UserError(f"--limits {limit}: must be one of {', '.join(LIMITS)}")
        environment = os.environ | LIMITS[limit]
        if limit == "avx2":
            if options.llama_avx2 is None:
                raise UserError(
                    "--limits avx2 needs --llama-avx2, since llama.cpp uses all instructions it was built with"
                )
            folder = str(options.llama_avx2.resolve())
            environment |= {"LLAMA_CPP_LIB_PATH": folder, "LD_LIBRARY_PATH": folder}
        rows = measure_stories(options, model, limit, environment) + measure_benches(options, model, limit, environment)
        print(f"\n{limit}: goal, reached")
        for row in rows:
            print(f"  {row['bar']:72} {row['goal']:5.2f} {row['reached']:6.2f}  {row.get('ours', '')}  {row['rates']}")
        results += rows
    print(json.dumps({"benchmark": "cpu_bars", "results": results}))


def measure_stories(
    options: argparse.Namespace, model: Path, limit: str, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Run `tinystories generate` of both commits in turns."""
    rows = []
    for name, arguments, precision, goals in STORIES:
        if not re.search(options.only, name):
            continue
        programs = {"base": (options.base, "int8"), "ours": (ROOT, precision)}
        rates: dict[str, list[float]] = {label: [] for label in programs}
        for number in range(options.rounds + 1):
            for label, (root, own) in programs.items():
                words = [str(model), "--seed", str(number), *arguments, "--precision", own]
                rate = tell(root, words, environment, options.cpu_seconds)
                if number:  # the first round is a warm-up
                    rates[label].append(rate)
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["base"], strict=True))
        medians = {label: round(statistics.median(values)) for label, values in rates.items()}
        rows.append({"limit": limit, "bar": name, "goal": goals[limit], "reached": round(ratio, 3), "rates": medians})
    return rows


def tell(root: Path, arguments: list[str], environment: dict[str, str], by_cpu_seconds: bool) -> float:
    """Return the tokens/s of `tinystories generate` in a checkout, which it prints itself.

    Those of processor time are without what the same command needs for a single token.
    """
    command = [sys.executable, "-m", "tinystories", "generate", *arguments, "--threads", "1", "--no-stream"]
    environment = environment | {"PYTHONPATH": str(root.resolve() / "src")}
    used = [resource.getrusage(resource.RUSAGE_CHILDREN)]
    done = run(command, environment)
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    counts = re.search(r"\[([\d,]+) tokens, ([\d,.]+) tokens/s", done.stderr)
    if counts is None:
        raise UserError(f"{root}: no tokens/s in {done.stderr.strip()!r}")
    n_tokens, rate = (float(count.replace(",", "")) for count in counts.groups())
    if not by_cpu_seconds:
        return rate
    run([*command, "--max-tokens", "1", "--num", "1"], environment)
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
    at = [usage.ru_utime + usage.ru_stime for usage in used]
    return (n_tokens - 1) / ((at[1] - at[0]) - (at[2] - at[1]))


def measure_benches(
    options: argparse.Namespace, model: Path, limit: str, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Run `tinystories bench` with every other program."""
    rows = []
    for name, arguments, all_bars in BENCHES:
        bars = [bar for bar in all_bars if re.search(options.only, f"{name}: {bar.name}")]
        if not bars or (options.cpu_seconds and "1" not in arguments):
            continue
        program = [sys.executable, "-m", "tinystories", "bench"]
        arguments = [argument.format(model=model) for argument in arguments]
        command = [*program, *arguments, "--peers", "--json", "--runs", str(options.rounds)]
        command += ["--cpu-seconds"] * options.cpu_seconds
        paths = [str(ROOT / "src"), *filter(None, [environment.get("PYTHONPATH")])]
        result = json.loads(run(command, environment | {"PYTHONPATH": os.pathsep.join(paths)}).stdout)
        tasks = [task for task in ("prefill", "decode", "batch") if task in result]
        rates = {task: result[task]["tokens_per_s"] for task in tasks}
        for bar in bars:
            reached = round(bar.reached(result), 3)
            label = f"{name}: {bar.name}"
            row = {"limit": limit, "bar": label, "goal": bar.goals[limit], "reached": reached, "rates": rates}
            if bar.task:
                row["ours"] = ratios_to_best(result[bar.task]["runs"])
            rows.append(row)
    return rows


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[3:])}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return done


if __name__ == "__main__":
    run_main(main)
