"""Ablation of the training recipe: the preset, and the preset with one thing changed, for the same number of tokens.

Every run trains from scratch in its own single-threaded process; finished runs are not repeated. Prints a table of bits
per byte on the validation stories (docs/evaluation.md) and the change from the recipe, averaged over the seeds, and one
JSON line; draws ablation.png. Seconds count training steps only.

    tinystories prepare train.txt --val valid.txt --tokenizer bpe:4096 --out data/bpe4096
    python benchmarks/ablation.py --data data/bpe4096 --out runs/ablation --tokens 1024000
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script import run_main
from training_runs import build_train_command, execute_all, final_record, training_seconds

from tinystories.cli import main as tinystories_main
from tinystories.config_file import load_config
from tinystories.data import loader
from tinystories.model import GPT
from tinystories.train import step
from tinystories.train.optimizer import build as optim
from tinystories.train.optimizer.learning_rate import resolve_auto_rates


@dataclass(frozen=True)
class Variant:
    """The recipe with other settings, or with part of the program patched."""

    description: str
    settings: dict[str, Any] = field(default_factory=dict)
    patch: str = ""


VARIANTS = {
    "recipe": Variant("the recipe"),
    "adamw": Variant("AdamW for all weights", {"optim.kind": "adamw"}),
    "windows": Variant("random windows of the token stream instead of packed stories", patch="windows"),
    "classic": Variant("classic architecture", {"model.architecture": "classic", "model.n_ff": "4x"}),
    "embedding-rate": Variant("a third of AdamW's learning rate", {"optim.learning_rate": "/3"}),
    "cosine": Variant(
        "cosine decay to a tenth instead of linear decay to zero", {"schedule.kind": "cosine", "schedule.floor": 0.1}
    ),
    "plain-muon": Variant("plain Muon: Jordan's quintic, no row norm, fixed momentum", patch="plain_muon"),
    "batch-2x": Variant("twice the batch size (learning rates follow)", {"train.batch_size": "*2"}),
    "no-qk-norm": Variant("no QK norm", {"model.qk_norm": "false"}),
    "zero-init": Variant("zero-initialized block outputs", patch="zero_init"),
    "no-decay": Variant("no weight decay", {"optim.weight_decay": 0.0}),
    "dropout": Variant("dropout 0.1", {"model.dropout": 0.1}),
    "uneven-rows": Variant("Muon without row normalization", patch="uneven_rows"),
    "jordan": Variant("Muon with Jordan's quintic", patch="jordan"),
    "five-quintics": Variant("Muon with five iterations, for singular values from 0.001", patch="five_quintics"),
    "two-quintics": Variant("Muon with two iterations, for singular values from 0.03", patch="two_quintics"),
    "fixed-momentum": Variant("Muon with fixed momentum", patch="fixed_momentum"),
    "no-clip": Variant("no gradient clipping", {"optim.grad_clip": 0.0}),
    "beta2": Variant("AdamW's beta2 0.95 instead of 0.99, or the reverse", {"optim.beta2": "other"}),
}


def main() -> None:
    if sys.argv[1:2] == ["--patched"]:  # train one variant in this process
        globals()[sys.argv[2]]()
        tinystories_main(sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", default="small", help="preset or TOML file")
    parser.add_argument("--tokens", type=int, default=1_024_000)
    parser.add_argument("--seeds", default="1", help="comma-separated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated subset of the variants")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile for all runs")
    parser.add_argument("--workers", type=int, default=2, help="runs in parallel, one thread each")
    options = parser.parse_args()
    runs_by_variant = {
        name: [f"{name}_seed{seed}" for seed in options.seeds.split(",")] for name in options.variants.split(",")
    }
    plan = {run: build_command(options, run) for runs in runs_by_variant.values() for run in runs}
    execute_all(options.out, plan, options.workers)
    report(options, runs_by_variant)


def build_command(options: argparse.Namespace, run: str) -> list[str]:
    name, _, seed = run.rpartition("_seed")
    variant = VARIANTS[name]
    settings = {key: resolve_setting(options.config, key, value) for key, value in variant.settings.items()}
    run_settings = {
        "train.seed": seed,
        "train.eval_every": 10**6,
        "train.sample_tokens": 1,
        "train.compile": options.compile,
    }
    arguments = build_train_command(
        options.out / run, options.config, options.data, options.tokens, settings | run_settings
    )
    if variant.patch:
        arguments[1:3] = [__file__, "--patched", variant.patch]
    return arguments


def resolve_setting(config_name: str, key: str, value: Any) -> Any:
    """Return the value of a setting, which may be relative to the recipe's ("*2", "/3", "4x", "other")."""
    config = resolve_auto_rates(load_config(config_name))
    section, _, name = key.partition(".")
    recipe_value = getattr(getattr(config, section), name)
    match value:
        case "other":
            return 0.99 if recipe_value < 0.97 else 0.95
        case "4x":
            return 4 * config.model.n_embd
        case "*2":
            return recipe_value * 2
        case "/3":
            return recipe_value / 3
    return value


def zero_init() -> None:
    """Initialize the output projections of each block to zero, so that blocks start as the identity."""
    original_reset = GPT.reset_parameters

    @torch.no_grad()
    def reset_parameters(self: GPT) -> None:
        original_reset(self)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()

    GPT.reset_parameters = reset_parameters


def uneven_rows() -> None:
    optim.Muon = partial(optim.Muon, beta2=0.0)


def jordan() -> None:
    optim.Muon = partial(optim.Muon, quintics=[(3.4445, -4.7750, 2.0315)] * 5)


def five_quintics() -> None:
    first = [(8.287, -23.596, 17.300), (4.107, -2.948, 0.545), (3.949, -2.909, 0.552)]
    optim.Muon = partial(optim.Muon, quintics=[*first, (3.318, -2.488, 0.510), (2.301, -1.669, 0.419)])


def two_quintics() -> None:
    optim.Muon = partial(optim.Muon, quintics=[(7.363, -20.745, 15.162), (2.918, -2.183, 0.476)])


def fixed_momentum() -> None:
    step.get_momentum = lambda step, steps, final: final  # noqa: ARG005


def plain_muon() -> None:
    uneven_rows()
    jordan()
    fixed_momentum()


def windows() -> None:
    """Use nanoGPT's batches: windows at random positions of the concatenated stories."""

    def rows(self: loader.PackedRows, indices: loader.Ints) -> tuple[loader.Ints, loader.Ints]:
        spans = []
        for index in indices:
            start = int(np.random.default_rng([self.seed, index]).integers(len(self.tokens) - self.n_ctx))
            spans.append(self.tokens[start : start + self.n_ctx + 1].astype(np.int64))
        stacked = np.stack(spans)
        return stacked[:, :-1], stacked[:, 1:]

    loader.PackedRows.get_rows = rows
    loader.PackedRows.count_targets = lambda self, _, batch_size: batch_size * self.n_ctx


def report(options: argparse.Namespace, runs_by_variant: dict[str, list[str]]) -> None:
    """Print the table and the JSON line; draw the plot."""
    results = {}
    for name, runs in runs_by_variant.items():
        scores = [final_record(options.out / run)["val_bits_per_byte"] for run in runs]
        results[name] = {
            "bits_per_byte": statistics.mean(scores),
            "seeds": scores,
            "seconds": round(statistics.mean(training_seconds(options.out / run) for run in runs), 1),
        }
    recipe = results.get("recipe", next(iter(results.values())))["bits_per_byte"]
    ranked_names = sorted(results, key=lambda name: results[name]["bits_per_byte"])
    print(f"\n{options.config}, {options.tokens:,} tokens\n{'':52} {'bits/byte':>10} {'change':>8} {'seconds':>8}")
    for name in ranked_names:
        row = results[name]
        change = row["bits_per_byte"] - recipe
        print(f"{VARIANTS[name].description:52} {row['bits_per_byte']:10.4f} {change:+8.4f} {row['seconds']:8,.0f}")
    draw(
        options.out / "ablation.png",
        {VARIANTS[n].description: results[n]["bits_per_byte"] - recipe for n in ranked_names},
    )
    environment = {
        "benchmark": "ablation",
        "config": options.config,
        "tokens": options.tokens,
        "torch": torch.__version__,
    }
    print(json.dumps(environment | {"results": results}))


def draw(path: Path, changes: dict[str, float]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.35 * len(changes) + 1), layout="constrained")
    colors = ["#3182bd" if change <= 0 else "#c44e52" for change in changes.values()]
    bars = axes.barh(list(changes), list(changes.values()), color=colors)
    axes.bar_label(bars, fmt="%+.4f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="bits per byte against the recipe (more is worse)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
