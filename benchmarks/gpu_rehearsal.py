"""Run both plans of benchmarks/gpu.py on the CPU at toy sizes, as the borrowed machine would.

Uses a copy of the source tree with its own kit, and a virtual environment with only the distributions of that machine
(benchmarks/gpu_machine.txt) and the kit's wheels. One step exceeds its limit on purpose. Afterward, a second call must
skip everything, the files to copy back must respect the limits, and the weights must unpack and generate a story. The
last line summarizes what ran: `measure 6 of 6 steps, train 3 of 3, cut on purpose 1, skipped 0`; anything else fails.

    python benchmarks/gpu_rehearsal.py --nanogpt nanoGPT/model.py --data stories     both optional, see gpu_kit.py
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from gpu import MAX_FILE_BYTES, MAX_FILES, MAX_TOTAL_BYTES
from gpu_kit import ROOT, list_tree_files
from script import run_main

from tinystories.errors import UserError

CUT_STEP = "cut on purpose"
BUDGETS = {"measure": 1500, "train": 240}  # seconds, generous even for a slow machine
FILE_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="model.py of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, help="folder of stories")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "out"
        for path in list_tree_files():
            if path.is_file():
                (tree / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tree / path.relative_to(ROOT))
        python = build_environment(Path(folder) / "environment")
        make_kit(options, tree)
        outcomes = {plan: run_plan(python, tree, plan, out) for plan in ("measure", "train")}
        second_outcomes = run_plan(python, tree, "measure", out)
        check_second_call(outcomes["measure"], second_outcomes)
        check_limits(out)
        generate_stories(tree, out, Path(folder) / "models")
    print(summarize(outcomes))


def build_environment(folder: Path) -> Path:
    """Create a virtual environment with symlinks to the machine's distributions, and return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    lines = (ROOT / "benchmarks" / "gpu_machine.txt").read_text(encoding="utf-8").splitlines()
    for name in (line for line in lines if line and not line.startswith("#")):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def make_kit(options: argparse.Namespace, tree: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_kit.py"), "--out", str(tree / "gpu-kit")]
    for name in ("nanogpt", "data"):
        if (path := getattr(options, name)) is not None:
            command += [f"--{name}", str(path)]
    if options.data is None:
        command += ["--vocab", "300"]
    if subprocess.run(command, check=False).returncode:
        raise UserError("gpu_kit.py failed; its error is printed above")


def run_plan(python: Path, tree: Path, plan: str, out: Path) -> dict[str, str]:
    """Run a plan, and return the outcome of each step."""
    shutil.rmtree(out, ignore_errors=True)  # the borrowed machine also empties it before each command
    command = [str(python), "benchmarks/gpu.py", plan, "--toy", "--budget", str(BUDGETS[plan]), "--out", str(out)]
    inherited = ("PATH", "HOME", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in inherited if name in os.environ}
    completed = subprocess.run(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    print(completed.stdout, end="", flush=True)
    outcomes: dict[str, str] = {}
    for line in completed.stdout.splitlines():
        if line.startswith("{"):
            outcomes = json.loads(line)["outcomes"]
    unexpected = [
        step for step, outcome in outcomes.items() if outcome != expected_outcome(step) and "before" not in outcome
    ]
    if completed.returncode or not outcomes or unexpected:
        for log in (tree / "runs" / "gpu" / "logs").glob("*.log"):
            if log.stem in unexpected:
                print(f"--- {log.stem}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        steps = ", ".join(unexpected) or "none"
        raise UserError(
            f"{plan} ended with exit code {completed.returncode}; steps with an unexpected outcome: {steps}"
        )
    return outcomes


def expected_outcome(step: str) -> str:
    return "cut" if step == CUT_STEP else "done"


def check_second_call(first: dict[str, str], second: dict[str, str]) -> None:
    """Check that a second call skips finished steps and retries those that were cut."""
    expected_outcomes = {step: "done before" if outcome == "done" else outcome for step, outcome in first.items()}
    if second != expected_outcomes:
        raise UserError(f"the second call returned {second}, expected {expected_outcomes}")


def check_limits(out: Path) -> None:
    files = list(out.rglob("*"))
    sizes = [path.stat().st_size for path in files]
    names_are_valid = all(FILE_NAME_PATTERN.fullmatch(path.name) and path.is_file() for path in files)
    if not (
        names_are_valid
        and 0 < len(files) <= MAX_FILES
        and max(sizes) <= MAX_FILE_BYTES
        and sum(sizes) <= MAX_TOTAL_BYTES
    ):
        raise UserError(f"these files would not be copied back: {[path.name for path in files]}")
    records: list[dict[str, Any]] = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    if not any(record["step"] == CUT_STEP and "result" in record for record in records):
        raise UserError("the records lack the output of the step that was cut")


def generate_stories(tree: Path, out: Path, models: Path) -> None:
    """Unpack the weights, and generate a few words with each model."""
    unpack = [sys.executable, str(tree / "benchmarks" / "gpu.py"), "unpack", str(out), "--to", str(models)]
    subprocess.run(unpack, check=True)
    folders = sorted(models.iterdir())
    if len(folders) < 2:
        raise UserError(f"only {len(folders)} models were copied back")
    for folder in folders:
        words = ["generate", str(folder), "--max-tokens", "8", "--engine", "torch", "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "tinystories", *words], check=True, stdout=subprocess.DEVNULL)


def summarize(outcomes: dict[str, dict[str, str]]) -> str:
    all_outcomes = [(step, outcome) for steps in outcomes.values() for step, outcome in steps.items()]
    parts = [
        f"{plan} {sum(outcome == expected_outcome(step) for step, outcome in steps.items())} of {len(steps)}"
        + " steps" * (plan == "measure")
        for plan, steps in outcomes.items()
    ]
    parts.append(f"{CUT_STEP} {sum(step == CUT_STEP and outcome == 'cut' for step, outcome in all_outcomes)}")
    return ", ".join([*parts, f"skipped {sum(outcome == 'skipped' for _, outcome in all_outcomes)}"])


if __name__ == "__main__":
    run_main(main)
