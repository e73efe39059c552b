"""Runs both plans of benchmarks/gpu.py on the CPU at toy sizes, as the borrowed machine would: everything but the GPU.

From a copy of the tree with a kit of its own, in an environment of this Python with only those distributions that the
machine has (benchmarks/gpu_machine.txt) and the kit's wheels. One step is cut by its limit on purpose. Then a second
call must find all done, what would come back must keep to the limits, and the weights are unpacked and tell a story.
The last line says what ran: `measure 6 of 6 steps, train 3 of 3, cut on purpose 1, skipped 0`; anything else fails.

    python benchmarks/gpu_rehearsal.py --nanogpt nanoGPT/model.py --data stories     both optional, as for gpu_kit.py
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

from gpu import MOST_BYTES, MOST_FILES, MOST_TOTAL
from gpu_kit import ROOT, travelling
from program import as_program

from tinystories.errors import UserError

ON_PURPOSE = "cut on purpose"
BUDGETS = {"measure": 1500, "train": 240}  # seconds; no step needs all of it on the slowest machine
NAME = re.compile(r"[A-Za-z0-9._-]+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="model.py of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, help="folder of stories")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "out"
        for path in travelling():
            if path.is_file():
                (tree / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tree / path.relative_to(ROOT))
        python = build_environment(Path(folder) / "environment")
        make_kit(options, tree)
        outcomes = {plan: call(python, tree, plan, out) for plan in ("measure", "train")}
        again = call(python, tree, "measure", out)
        check_again(outcomes["measure"], again)
        check_limits(out)
        tell_story(tree, out, Path(folder) / "models")
    print(summary(outcomes))


def build_environment(folder: Path) -> Path:
    """A virtual environment in which links stand for the machine's distributions; returns its Python."""
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
        raise UserError("the kit could not be made")


def call(python: Path, tree: Path, plan: str, out: Path) -> dict[str, str]:
    """The outcome of each step of a plan."""
    shutil.rmtree(out, ignore_errors=True)  # as it is emptied there before each command
    command = [str(python), "benchmarks/gpu.py", plan, "--toy", "--budget", str(BUDGETS[plan]), "--out", str(out)]
    inherited = ("PATH", "HOME", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in inherited if name in os.environ}
    done = subprocess.run(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    print(done.stdout, end="", flush=True)
    outcomes: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            outcomes = json.loads(line)["outcomes"]
    bad = [step for step, outcome in outcomes.items() if outcome != expected(step) and "before" not in outcome]
    if done.returncode or not outcomes or bad:
        for log in (tree / "runs" / "gpu" / "logs").glob("*.log"):
            if log.stem in bad:
                print(f"--- {log.stem}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        what = ", ".join(bad) or "the end"
        raise UserError(f"{plan} ended with exit code {done.returncode}; not as expected: {what}")
    return outcomes


def expected(step: str) -> str:
    return "cut" if step == ON_PURPOSE else "done"


def check_again(first: dict[str, str], second: dict[str, str]) -> None:
    """What was done is not done again; what was cut is tried again."""
    wanted = {step: "done before" if outcome == "done" else outcome for step, outcome in first.items()}
    if second != wanted:
        raise UserError(f"a second call did {second}, not {wanted}")


def check_limits(out: Path) -> None:
    files = list(out.rglob("*"))
    sizes = [path.stat().st_size for path in files]
    named = all(NAME.fullmatch(path.name) and path.is_file() for path in files)
    if not (named and 0 < len(files) <= MOST_FILES and max(sizes) <= MOST_BYTES and sum(sizes) <= MOST_TOTAL):
        raise UserError(f"these would not come back: {[path.name for path in files]}")
    records: list[dict[str, Any]] = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    if not any(record["step"] == ON_PURPOSE and "result" in record for record in records):
        raise UserError("what the step that was cut had printed is not in the records")


def tell_story(tree: Path, out: Path, models: Path) -> None:
    """Unpack the weights, and have each model write a few words."""
    unpack = [sys.executable, str(tree / "benchmarks" / "gpu.py"), "unpack", str(out), "--to", str(models)]
    subprocess.run(unpack, check=True)
    folders = sorted(models.iterdir())
    if len(folders) < 2:
        raise UserError(f"only {len(folders)} models came back")
    for folder in folders:
        words = ["generate", str(folder), "--max-tokens", "8", "--engine", "torch", "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "tinystories", *words], check=True, stdout=subprocess.DEVNULL)


def summary(outcomes: dict[str, dict[str, str]]) -> str:
    every = [(step, outcome) for steps in outcomes.values() for step, outcome in steps.items()]
    parts = [
        f"{plan} {sum(outcome == expected(step) for step, outcome in steps.items())} of {len(steps)}"
        + " steps" * (plan == "measure")
        for plan, steps in outcomes.items()
    ]
    parts.append(f"{ON_PURPOSE} {sum(step == ON_PURPOSE and outcome == 'cut' for step, outcome in every)}")
    return ", ".join([*parts, f"skipped {sum(outcome == 'skipped' for _, outcome in every)}"])


if __name__ == "__main__":
    as_program(main)
