"""Best bits per byte for each number of epochs: how far a model gets on a small dataset before it overfits.

Trains one model size for several numbers of epochs, dropouts, weight decays and schedules: `line` decays linearly to
zero, like the presets; `flat` keeps the learning rate after the warmup, for weight averaging. The last checkpoints of
each run, evenly spaced over the last quarter of the steps, are also averaged and scored (Izmailov et al. 2018, arXiv
1803.05407). Each run trains in its own single-threaded process; finished runs are not repeated, interrupted ones
resume. Prints a table of bits per byte on all validation stories and one JSON line; draws frontier.png.

    tinystories prepare train.txt --val valid.txt --tokenizer bpe:4096 --out data/bpe4096
    python benchmarks/frontier.py --data data/bpe4096 --out runs/frontier --shape 6x240 --heads 6 --epochs 2,4,8
    python benchmarks/frontier.py --data data/bpe4096 --out runs/frontier --shape 6x240 --heads 6 --epochs 8 \\
      --dropout 0,0.1,0.2
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from script import run_main
from training_runs import build_train_command, execute_all, final_record, read_records, training_seconds

from tinystories.checkpoint import list_checkpoints, read_model
from tinystories.config_file import load_config
from tinystories.data.dataset import open_split
from tinystories.data.loader import PackedRows
from tinystories.engine.torch_engine import TorchEngine, load_weights
from tinystories.evaluate.bits import evaluate_bits_per_byte, read_prepared_stories
from tinystories.model import GPT

CHECKPOINTS = 64  # per run; those of its last quarter are kept
AVERAGE_COUNTS = (4, 8, 16)  # how many of the last checkpoints to average
SCHEDULES: dict[str, dict[str, Any]] = {"line": {}, "flat": {"schedule.decay": 0.0, "schedule.kind": "wsd"}}


@dataclass(frozen=True)
class GridPoint:
    epochs: float
    dropout: float
    weight_decay: float
    schedule: str

    @property
    def name(self) -> str:
        return f"{self.epochs:g}epochs_dropout{self.dropout:g}_decay{self.weight_decay:g}_{self.schedule}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", default="small", help="preset or TOML file with all other settings")
    parser.add_argument("--shape", default="6x240", help="layers x width")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--epochs", default="2,4,8", help="comma-separated, as are the three options below")
    parser.add_argument("--dropout", default="0.1")
    parser.add_argument("--decay", default="0.1", help="weight decay")
    parser.add_argument("--schedule", default="line", help=" or ".join(SCHEDULES))
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile for all runs")
    parser.add_argument("--workers", type=int, default=2, help="runs in parallel, one thread each")
    options = parser.parse_args()
    grid = [[float(value) for value in text.split(",")] for text in (options.epochs, options.dropout, options.decay)]
    points = [GridPoint(*values) for values in itertools.product(*grid, options.schedule.split(","))]  # type: ignore[arg-type]
    execute_all(options.out, {point.name: build_command(options, point) for point in points}, options.workers)
    report(options, points)


def build_command(options: argparse.Namespace, point: GridPoint) -> list[str]:
    n_layer, n_embd = map(int, options.shape.split("x"))
    settings: dict[str, Any] = {
        "model.n_layer": n_layer,
        "model.n_embd": n_embd,
        "model.n_head": options.heads,
        "model.n_ff": round(8 * n_embd / 3 / 8) * 8,
        "model.dropout": point.dropout,
        "optim.weight_decay": point.weight_decay,
        **SCHEDULES[point.schedule],
    }
    config = load_config(options.config, {name: str(value) for name, value in settings.items()})
    rows = PackedRows(options.data, "train", config.model.n_ctx, config.train.seed).n_rows
    steps = round(point.epochs * rows / config.train.batch_size)
    settings |= {
        "train.steps": steps,
        "train.eval_every": max(1, steps // 16),
        "train.checkpoint_every": max(1, steps // CHECKPOINTS),
        "train.keep_checkpoints": max(AVERAGE_COUNTS),
        "train.compile": options.compile,
    }
    return build_train_command(options.out / point.name, options.config, options.data, 0, settings)


def score_averages(run: Path, data: Path) -> dict[str, float]:
    """Return bits per byte of the averaged last checkpoints, by their number; cached in averages.json of the run."""
    path = run / "averages.json"
    if not path.exists():
        folders = [folder for _, folder in sorted(list_checkpoints(run))]
        val = open_split(data, "val")
        scores = {}
        for count in (n for n in AVERAGE_COUNTS if n <= len(folders)):
            engine = TorchEngine(average_weights(folders[-count:]))
            scores[str(count)] = evaluate_bits_per_byte(engine, read_prepared_stories(*val)).bits_per_byte
        path.write_text(json.dumps(scores))
    return dict(json.loads(path.read_text()))


@torch.no_grad()
def average_weights(folders: list[Path]) -> GPT:
    """Return a model whose weights are the means of those of several checkpoints."""
    model, source = (GPT(read_model(folders[0]).config) for _ in range(2))
    for weight in model.parameters():
        weight.zero_()
    for folder in folders:
        load_weights(read_model(folder), source)
        for mean, weight in zip(model.parameters(), source.parameters(), strict=True):
            mean.add_(weight, alpha=1 / len(folders))
    return model.eval()


def report(options: argparse.Namespace, points: list[GridPoint]) -> None:
    """Print the table and the JSON line; draw the plot."""
    results: list[dict[str, Any]] = []
    print(f"\n{options.shape}, {options.config}; averages of the last {AVERAGE_COUNTS} of {CHECKPOINTS} checkpoints")
    print(f"{'run':44} {'tokens':>12} {'seconds':>8} {'train':>7} {'val':>7}  averages")
    for point in points:
        run = options.out / point.name
        last_record, average_scores, elapsed = (
            final_record(run),
            score_averages(run, options.data),
            training_seconds(run),
        )
        train = [record["bits_per_byte"] for record in read_records(run) if "loss" in record][-20:]
        train_score = sum(train) / len(train)
        tokens, score = last_record["tokens"], last_record["val_bits_per_byte"]
        row = f"{point.name:44} {tokens:12,} {elapsed:8,.0f} {train_score:7.4f} {score:7.4f}"
        print(row, " ", "  ".join(f"{average:.4f}" for average in average_scores.values()))
        results.append(
            {"run": point.name, "tokens": tokens, "seconds": round(elapsed, 1), "train_bits_per_byte": train_score,
             "bits_per_byte": score, "averages": average_scores}
        )  # fmt: skip
    draw(options.out, points)
    environment = {
        "benchmark": "frontier",
        "config": options.config,
        "shape": options.shape,
        "torch": torch.__version__,
    }
    print(json.dumps(environment | {"results": results}))


def draw(folder: Path, points: list[GridPoint]) -> None:
    """Plot final bits per byte against epochs, one line per combination of dropout, weight decay and schedule."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    groups = sorted({(point.dropout, point.weight_decay, point.schedule) for point in points})
    for dropout, decay, schedule in groups:
        curve = sorted(
            (
                point
                for point in points
                if (point.dropout, point.weight_decay, point.schedule) == (dropout, decay, schedule)
            ),
            key=lambda point: point.epochs,
        )
        scores = [final_record(folder / point.name)["val_bits_per_byte"] for point in curve]
        label = f"dropout {dropout:g}, decay {decay:g}, {schedule}"
        axes.plot([point.epochs for point in curve], scores, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="epochs", ylabel="bits per byte on validation stories")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "frontier.png", dpi=120)


if __name__ == "__main__":
    run_main(main)
