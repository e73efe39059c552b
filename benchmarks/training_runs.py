"""Run trainings in separate processes, skip finished ones, and read back their metrics."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tinystories.errors import UserError


def execute_all(folder: Path, plan: Mapping[str, list[str]], workers: int) -> None:
    """Run the commands of a plan (run name -> command), `workers` in parallel with one thread each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: execute_run(folder / job[0], job[1]), plan.items()))


def execute_run(run: Path, command: list[str]) -> None:
    """Run a training command, logging to RUN.log; a finished run is skipped. `UserError` if it fails."""
    if is_done(run):
        return
    start_time = time.perf_counter()
    path = run.parent / f"{run.name}.log"
    with path.open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        completed = subprocess.run(command, check=False, stdout=log, stderr=log, env=environment)
    if completed.returncode:
        last_line = path.read_text().strip().rpartition("\n")[2]
        raise UserError(f"training failed with exit code {completed.returncode}, log in {path}: {last_line}")
    print(
        f"{run.name}: {final_record(run)['val_bits_per_byte']:.4f} in {time.perf_counter() - start_time:,.0f} s",
        flush=True,
    )


def build_train_command(run: Path, config: str, data: Path, tokens: int, settings: Mapping[str, Any]) -> list[str]:
    """Return the `tinystories train` command for about `tokens` tokens; `settings` override those of `config`."""
    from tinystories.config_file import load_config

    resolved = load_config(config, {name: str(value) for name, value in settings.items()})
    steps = round(tokens / resolved.train.batch_size / resolved.model.n_ctx)
    run_settings = {"train.steps": steps, "train.checkpoint_every": max(100, steps // 4)} | dict(settings)
    flags = [word for name, value in run_settings.items() for word in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "tinystories", "train", "--resume"]
    return [*program, "--config", config, "--data", str(data), "--out", str(run), *flags]


def read_records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_record(run: Path) -> dict[str, Any]:
    return read_records(run)[-1]


def is_done(run: Path) -> bool:
    run_records = read_records(run)
    return bool(run_records) and bool(run_records[-1].get("final"))


def training_seconds(run: Path) -> float:
    """Return the seconds of training steps, without evaluations."""
    return max(float(record.get("seconds", 0.0)) for record in read_records(run))
