"""Does training in bf16 cost quality? Bits per byte of runs in bf16 and in fp32 on a CPU, several seeds each.

Both precisions train from the same weights on the same rows. `train.precision = "auto"` may use bf16 on a CPU if the
mean over the seeds is at most 0.003 worse (docs/training.md). Every run has its own single-threaded process; finished
runs are not repeated, so the command can be stopped and restarted. Prints a table and one JSON line.

    tinystories prepare train.txt --val valid.txt --tokenizer bpe:4096 --out data/bpe4096
    python benchmarks/precision_quality.py --data data/bpe4096 --out runs/precision
"""

import argparse
import json
import statistics
from pathlib import Path

from script import run_main
from training_runs import build_train_command, execute_all, final_record

PRECISIONS = ("fp32", "bf16")
MAX_DIFFERENCE = 0.003  # bits per byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", default="storyteller")
    parser.add_argument("--tokens", type=int, default=2_048_000)
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--workers", type=int, default=1, help="runs in parallel, one thread each")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    plan = {}
    for seed in seeds:
        for precision in PRECISIONS:
            settings = {"train.precision": precision, "train.seed": seed, "train.device": "cpu", "model.dropout": 0.0}
            run = f"{precision}-seed{seed}"
            plan[run] = build_train_command(options.out / run, options.config, options.data, options.tokens, settings)
    execute_all(options.out, plan, options.workers)
    scores = {
        precision: [final_record(options.out / f"{precision}-seed{seed}")["val_bits_per_byte"] for seed in seeds]
        for precision in PRECISIONS
    }
    means = {precision: statistics.mean(values) for precision, values in scores.items()}
    for precision, values in scores.items():
        print(f"{precision}  mean {means[precision]:.4f}  {'  '.join(f'{value:.4f}' for value in values)}")
    difference = means["bf16"] - means["fp32"]
    verdict = "within" if difference <= MAX_DIFFERENCE else "NOT within"
    print(f"bf16 - fp32: {difference:+.4f}, {verdict} {MAX_DIFFERENCE}")
    print(json.dumps({"benchmark": "precision_quality", "tokens": options.tokens, "val_bits_per_byte": scores}))


if __name__ == "__main__":
    run_main(main)
