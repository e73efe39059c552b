"""Learning rate transfer: whether the `auto` learning rates stay near-optimal when the model size changes.

Trains three sizes with the `auto` learning rates times several factors, on the same number of tokens. Each run trains
in its own single-threaded process; finished runs are not repeated. Prints a table of bits per byte on all validation
stories, how much the best factor gains over `auto` at each size, and one JSON line; draws transfer.png.

    tinystories prepare train.txt --val valid.txt --tokenizer bpe:4096 --out data/bpe4096
    python benchmarks/transfer.py --data data/bpe4096 --out runs/transfer
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from script import run_main
from training_runs import build_train_command, execute_all, final_record

from tinystories.config_file import load_config
from tinystories.train.optimizer.learning_rate import resolve_auto_rates

SIZES = {"4x128": (4, 128, 4, 344), "6x192": (6, 192, 4, 512), "8x256": (8, 256, 8, 688)}  # layers, width, heads, F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", default="small", help="preset or TOML file with all other settings")
    parser.add_argument("--tokens", type=int, default=512_000)
    parser.add_argument(
        "--factors", default="0.5,1,2", help="factors on both learning rates, comma-separated; must include 1"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated subset of the sizes")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile for all runs")
    parser.add_argument("--workers", type=int, default=2, help="runs in parallel, one thread each")
    options = parser.parse_args()
    factors = [float(factor) for factor in options.factors.split(",")]
    sizes = options.sizes.split(",")
    plan = {run_name(size, factor): build_command(options, size, factor) for size in sizes for factor in factors}
    execute_all(options.out, plan, options.workers)
    report(options, sizes, factors)


def run_name(size: str, factor: float) -> str:
    return f"{size}_{factor:g}"


def build_command(options: argparse.Namespace, size: str, factor: float) -> list[str]:
    n_layer, n_embd, n_head, n_ff = SIZES[size]
    shape = {"model.n_layer": n_layer, "model.n_embd": n_embd, "model.n_head": n_head, "model.n_ff": n_ff}
    optim = resolve_auto_rates(load_config(options.config, {name: str(value) for name, value in shape.items()})).optim
    rates = {f"optim.{name}": factor * getattr(optim, name) for name in ("learning_rate", "muon_rate")}
    run_settings = {"train.eval_every": 10**6, "train.sample_tokens": 1, "train.compile": options.compile}
    return build_train_command(
        options.out / run_name(size, factor), options.config, options.data, options.tokens, shape | rates | run_settings
    )


def report(options: argparse.Namespace, sizes: list[str], factors: list[float]) -> None:
    """Print the table and the JSON line; draw the plot."""
    scores_by_size: dict[str, dict[float, float]] = {
        size: {factor: final_record(options.out / run_name(size, factor))["val_bits_per_byte"] for factor in factors}
        for size in sizes
    }
    print(f"\n{options.tokens:,} tokens; `auto` learning rates times\n{'':8}" + "".join(f"{f:>9g}" for f in factors))
    results: dict[str, Any] = {}
    for size, scores in scores_by_size.items():
        auto_loss = scores[1.0] - min(scores.values())
        print(f"{size:8}" + "".join(f"{score:9.4f}" for score in scores.values()) + f"   auto loses {auto_loss:.4f}")
        results[size] = {"bits_per_byte": scores, "auto_loses": auto_loss}
    draw(options.out / "transfer.png", scores_by_size)
    environment = {
        "benchmark": "transfer",
        "config": options.config,
        "tokens": options.tokens,
        "torch": torch.__version__,
    }
    print(json.dumps(environment | {"results": results}))


def draw(path: Path, scores_by_size: dict[str, dict[float, float]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for size, scores in scores_by_size.items():
        axes.plot(list(scores), list(scores.values()), "o-", label=size)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="factor on the `auto` learning rates", ylabel="bits per byte on validation stories")
    axes.grid(alpha=0.3)
    axes.legend(title="layers x width")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
