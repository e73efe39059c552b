"""Train a model for as many epochs as fit into a number of seconds, and archive its weights.

A short pilot run measures the speed (along with whatever else runs on the device) and determines the number of steps,
at most --epochs, so that the schedule ends in time. Time counts from the start of this process. An interrupted run
resumes with its original number of steps. Afterward WORK/weights contains NAME-int8.tar (an int8-only model directory)
and NAME-fp16.tar (weights in fp16, which `gpu.py unpack` turns into a model directory). The last line is a JSON object
with the score.

    python benchmarks/timed_training.py wide --seconds 150 --epochs 12 --data data/stories --work runs/timed \\
      --config storyteller --model.n_embd 320 --model.n_head 5 --optim.weight_decay 0.8
"""

import argparse
import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file, save_file
from script import parse_settings, run_main

from tinystories.checkpoint import read_model
from tinystories.config import Config
from tinystories.config_file import load_config
from tinystories.data.loader import PackedRows
from tinystories.errors import UserError
from tinystories.train.run import train
from tinystories.weights.load import write_int8_model

PILOT_STEPS = 60  # the last 10 are timed, after compilation and memory growth
TIME_MARGIN = 0.93  # fraction of the time to plan for: other processes may slow the device down
PACKING_SECONDS = 5.0
FP16_WEIGHTS = "model-fp16.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the run, stored in WORK/NAME")
    parser.add_argument("--seconds", type=float, required=True, help="time budget of this process")
    parser.add_argument("--epochs", type=float, required=True, help="maximum number of epochs")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", default="storyteller", help="preset or TOML file with all other settings")
    options, overrides = parser.parse_known_args()
    settings = parse_settings(overrides)
    run = options.work / options.name
    resumed = (run / "config.toml").exists()
    config = load_config(run / "config.toml") if resumed else plan_config(options, settings)
    start_time = time.perf_counter()
    report = train(config, run, resume=True)
    elapsed = time.perf_counter() - start_time
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last_record = [record for record in metrics if "loss" in record][-1]
    score = report.bits_per_byte if report is not None else metrics[-1]["val_bits_per_byte"]
    archive_weights(run, options.work / "weights", options.name)
    result = {
        "benchmark": "timed training",
        "run": options.name,
        "parameters": read_model(run).config.n_params,
        "val_bits_per_byte": score,
        "train_bits_per_byte": last_record["bits_per_byte"],
        "steps": config.train.steps,
        "epochs": config.train.steps * config.train.batch_size / count_rows(config),
        "tokens_per_s": last_record["tokens"] / last_record["seconds"],
        "seconds": elapsed,
        "settings": settings,
    }
    print(json.dumps(result), flush=True)


def plan_config(options: argparse.Namespace, settings: dict[str, str]) -> Config:
    """Run the pilot, and return the config with the number of steps that fits."""
    no_evaluation = {"train.eval_every": str(10**9), "train.checkpoint_every": str(10**9)}
    settings = {"data.dir": str(options.data)} | settings | no_evaluation
    pilot = options.work / f"{options.name}.pilot"
    shutil.rmtree(pilot, ignore_errors=True)
    start_time = time.perf_counter()
    train(load_config(options.config, settings | {"train.log_every": "10", "train.steps": str(PILOT_STEPS)}), pilot)
    records = [json.loads(line) for line in (pilot / "metrics.jsonl").read_text().splitlines()]
    last_record = [record for record in records if "loss" in record][-1]
    # The real run has the same overhead: loading data, and a final evaluation on all stories, samples and a checkpoint.
    overhead = time.perf_counter() - start_time - last_record["seconds"] + PACKING_SECONDS
    shutil.rmtree(pilot)
    used_seconds = time.time() - psutil.Process().create_time()
    config = load_config(options.config, settings)
    tokens = (options.seconds - used_seconds - overhead) * TIME_MARGIN * last_record["tokens_per_s"]
    max_steps = options.epochs * count_rows(config) / config.train.batch_size
    steps = round(min(max_steps, tokens / (config.train.batch_size * config.model.n_ctx)))
    if steps < PILOT_STEPS:
        raise UserError(f"--seconds {options.seconds:g} is too short: the pilot run took {used_seconds:.0f} s")
    settings |= {"train.steps": str(steps), "train.checkpoint_every": str(max(1, steps // 4))}
    return load_config(options.config, settings)


def count_rows(config: Config) -> int:
    return PackedRows(Path(config.data.dir), "train", config.model.n_ctx, config.train.seed).n_rows


def archive_weights(run: Path, folder: Path, name: str) -> None:
    """Write the model in int8 and in fp16, each as one tar file."""
    files = read_model(run)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        int8_dir, fp16_dir = Path(temporary) / f"{name}-int8", Path(temporary) / f"{name}-fp16"
        write_int8_model(files, int8_dir)
        fp16_dir.mkdir()
        weights = {key: value.astype(np.float16) for key, value in load_file(files.weights_path).items()}
        save_file(weights, fp16_dir / FP16_WEIGHTS)
        for file in ("config.json", "generation.json", "tokenizer.json"):
            shutil.copyfile(run / file, fp16_dir / file)
        for directory in (int8_dir, fp16_dir):
            draft = folder / f"{directory.name}.tar.draft"
            with tarfile.open(draft, "w") as tar:
                tar.add(directory, directory.name)
            draft.rename(folder / f"{directory.name}.tar")


if __name__ == "__main__":
    run_main(main)
