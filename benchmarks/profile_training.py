"""Where the time of a training step goes, and how often the host waits for the device inside the loop.

Trains a preset on prepared data like `tinystories train`, and profiles some steps after a warmup (compilation,
optimizer state, memory allocator). Prints a table of the slowest operations and a JSON line: the fraction of time the
device is busy, and the blocking calls per step. A step waits once, for the results of the previous step
(`cudaEventSynchronize`); any other wait is a stall.

    python benchmarks/profile_training.py --config storyteller --data data/tinystories-bpe4096 --device cuda
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from script import parse_settings, run_main
from torch.profiler import ProfilerActivity, profile

from tinystories.config_file import load_config
from tinystories.train.loop import Trainer

# CUDA runtime calls that block the host. Copies are not listed: one that blocks (from unpinned memory) is followed by a
# stream synchronization, which is.
BLOCKING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WARM_UP_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="storyteller", help="preset or TOML file")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="steps to profile")
    parser.add_argument("--rows", type=int, default=20, help="rows of the table of operations")
    options, overrides = parser.parse_known_args()
    settings = parse_settings(overrides)
    steps = WARM_UP_STEPS + options.steps
    postponed = ("log_every", "eval_every", "checkpoint_every")  # postponed until after the profiled steps
    settings |= {"data.dir": str(options.data), "train.device": options.device}
    settings |= {f"train.{name}": str(steps + 1) for name in ("steps", *postponed)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config(options.config, settings), Path(folder))
        print(json.dumps(profile_steps(trainer, options.steps, options.rows)), flush=True)


def profile_steps(trainer: Trainer, n_steps: int, n_rows: int) -> dict[str, Any]:
    on_cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    with trainer.open_recorder(), trainer.prefetch_batches():
        for _ in range(WARM_UP_STEPS):
            trainer.launch_step()
        with profile(activities=activities) as profiler:
            start_time = time.perf_counter()
            for _ in range(n_steps):
                trainer.launch_step()
            launch_seconds = time.perf_counter() - start_time
            if on_cuda:
                torch.cuda.synchronize(trainer.device)
            seconds = time.perf_counter() - start_time
    averages = profiler.key_averages()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=n_rows, max_name_column_width=60))
    call_counts = {event.key: event.count for event in averages}
    busy_microseconds = sum(
        event.self_device_time_total for event in averages if event.device_type != torch.autograd.DeviceType.CPU
    )
    tokens = n_steps * trainer.config.train.batch_size * trainer.config.model.n_ctx
    return {
        "benchmark": "profile",
        "parameters": trainer.config.model.n_params,
        "steps": n_steps,
        "tokens_per_s": tokens / seconds,
        "seconds_per_step": seconds / n_steps,
        "launch_seconds_per_step": launch_seconds / n_steps,
        "device_busy": busy_microseconds / 1e6 / seconds if on_cuda else None,
        "waits_per_step": {name: call_counts.get(name, 0) / n_steps for name in BLOCKING_CALLS},
    }


if __name__ == "__main__":
    run_main(main)
