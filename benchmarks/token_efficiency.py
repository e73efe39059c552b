"""Token efficiency: this project's recipe against nanoGPT's model, data order and AdamW, on the same stories.

Every run trains from scratch in its own single-threaded process and writes a folder with metrics.jsonl; finished runs
are not repeated, so the command can be stopped and restarted. Bits per byte follow docs/evaluation.md for both. nanoGPT
is tuned: `--tune` runs a grid of learning rates and batch sizes on a quarter of the tokens, and the best settings then
run on all tokens. Ours is the unchanged preset, on 1/2.5 and 1/3.5 of the tokens and on all of them. Prints a table and
one JSON line; draws curves.png.

nanoGPT's model.py is not part of this project: pass the path to a checkout.

    tinystories prepare train.txt --val valid.txt --tokenizer bpe:4096 --out data/bpe4096
    python benchmarks/token_efficiency.py --nanogpt nanoGPT/model.py --data data/bpe4096 --out runs/efficiency --tune
    python benchmarks/token_efficiency.py --nanogpt nanoGPT/model.py --data data/bpe4096 --out runs/efficiency
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanogpt import build_nanogpt_optimizer, load_nanogpt
from script import run_main
from torch.nn import functional as F
from training_runs import build_train_command, execute_all, final_record, is_done, read_records, training_seconds

from tinystories.config_file import load_config
from tinystories.data.dataset import open_split
from tinystories.engine.torch_engine import group_by_length
from tinystories.evaluate.bits import evaluate_bits_per_byte, read_prepared_stories

EVALUATIONS = 16  # per run, on a fixed subset of 200 stories; the final one uses all
LEARNING_RATES, BATCH_SIZES = (1e-3, 2e-3, 4e-3, 8e-3), (8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="model.py of a nanoGPT checkout")
    parser.add_argument("--data", type=Path, required=True, help="folder made by `tinystories prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--config", default="small", help="our preset; nanoGPT uses its layers, width, heads and context"
    )
    parser.add_argument("--tokens", type=int, default=8_192_000)
    parser.add_argument("--peers", type=int, default=2, help="number of best nanoGPT settings to run on all tokens")
    parser.add_argument("--divisors", default="2.5,3.5,1", help="our runs train on the tokens divided by each of these")
    parser.add_argument("--seeds", default="1,2,3", help="seeds of our runs, comma-separated")
    parser.add_argument("--tune", action="store_true", help="run the nanoGPT grid on a quarter of the tokens")
    parser.add_argument("--workers", type=int, default=2, help="runs in parallel, one thread each")
    parser.add_argument(
        "--peer", help=argparse.SUPPRESS
    )  # one nanoGPT run in this process: learning rate,batch size,tokens
    options = parser.parse_args()
    if options.peer:
        rate, rows, tokens = options.peer.split(",")
        train_nanogpt(options, float(rate), int(rows), int(tokens))
        return
    plan = plan_tuning(options) if options.tune else plan_comparison(options)
    execute_all(options.out, plan, options.workers)
    report(options, list(plan))


def plan_tuning(options: argparse.Namespace) -> dict[str, list[str]]:
    return dict(
        build_nanogpt_command(options, rate, rows, options.tokens // 4)
        for rows in BATCH_SIZES
        for rate in LEARNING_RATES
    )


def plan_comparison(options: argparse.Namespace) -> dict[str, list[str]]:
    """Plan the best settings of the nanoGPT grid on all tokens, and ours on all tokens and on fewer."""
    tuned = [
        build_nanogpt_command(options, rate, rows, options.tokens // 4)[0]
        for rows in BATCH_SIZES
        for rate in LEARNING_RATES
    ]
    scores = {name: final_record(options.out / name) for name in tuned if is_done(options.out / name)}
    if len(scores) < len(tuned):
        sys.exit(f"nanoGPT is not tuned yet: {len(scores)} of {len(tuned)} runs are finished; run with --tune first")
    plan: dict[str, list[str]] = {}
    for name in sorted(scores, key=lambda name: scores[name]["val_bits_per_byte"])[: options.peers]:
        _, rate, rows, _ = name.split("_")
        plan |= [build_nanogpt_command(options, float(rate), int(rows), options.tokens)]
    for divisor in options.divisors.split(","):
        tokens = round(options.tokens / float(divisor))
        for seed in options.seeds.split(","):
            run = options.out / f"ours_{tokens / 1e6:.2f}M_seed{seed}"
            settings = {"train.seed": seed, "train.eval_every": evaluation_steps(options.config, tokens)}
            plan[run.name] = build_train_command(run, options.config, options.data, tokens, settings)
    return plan


def evaluation_steps(config_name: str, tokens: int) -> int:
    """Return the steps between evaluations that give `EVALUATIONS` of them."""
    config = load_config(config_name)
    return max(1, tokens // (config.train.batch_size * config.model.n_ctx * EVALUATIONS))


def build_nanogpt_command(options: argparse.Namespace, rate: float, rows: int, tokens: int) -> tuple[str, list[str]]:
    name = f"nanogpt_{rate:g}_{rows}_{tokens / 1e6:.2f}M"
    arguments = [
        "--nanogpt",
        options.nanogpt,
        "--data",
        options.data,
        "--out",
        options.out / name,
        "--config",
        options.config,
    ]
    return name, [sys.executable, __file__, *map(str, arguments), "--peer", f"{rate},{rows},{tokens}"]


def train_nanogpt(options: argparse.Namespace, peak_lr: float, rows: int, tokens: int) -> None:
    """Train as nanoGPT's train.py does.

    Random windows of the token stream, AdamW (0.9, 0.99), weight decay 0.1, clipping, cosine decay to a tenth.
    """
    shape = load_config(options.config).model
    torch.manual_seed(1337)
    train, _ = open_split(options.data, "train")
    val = open_split(options.data, "val")
    vocab_size = json.loads((options.data / "meta.json").read_text())["vocab_size"]
    model = load_nanogpt(
        options.nanogpt, n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head, block_size=shape.n_ctx,
        vocab_size=vocab_size, dropout=0.0, bias=False,
    )  # fmt: skip
    optimizer = build_nanogpt_optimizer(model, peak_lr, (0.9, 0.99), "cpu")
    steps, warmup, n_ctx = tokens // (rows * shape.n_ctx), 100, shape.n_ctx
    options.out.mkdir(parents=True, exist_ok=True)
    seconds, loss_sum = 0.0, 0.0
    with (options.out / "metrics.jsonl").open("w") as metrics:

        def write_record(**record: Any) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()

        for step in range(steps):
            start_time = time.perf_counter()
            progress = (step - warmup) / max(1, steps - warmup)
            lr = (
                peak_lr * (step + 1) / (warmup + 1)
                if step < warmup
                else peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            starts = torch.randint(len(train) - n_ctx, (rows,))
            windows = torch.from_numpy(np.stack([train[i : i + n_ctx + 1] for i in starts.tolist()]).astype(np.int64))
            _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds, loss_sum = seconds + time.perf_counter() - start_time, loss_sum + loss.item()
            counters = {"step": step + 1, "tokens": (step + 1) * rows * n_ctx, "seconds": round(seconds, 1)}
            if (step + 1) % 10 == 0:
                write_record(**counters, loss=loss_sum / 10)
                loss_sum = 0.0
            last = step + 1 == steps
            if last or (step + 1) % max(1, steps // EVALUATIONS) == 0:
                evaluation = evaluate_bits_per_byte(
                    NanoGPTEngine(model.eval(), shape), read_prepared_stories(*val, 0 if last else 200)
                )
                write_record(
                    **counters, val_bits_per_byte=evaluation.bits_per_byte, val_stories=evaluation.stories, final=last
                )
                model.train()


class NanoGPTEngine:
    """nanoGPT's model behind the part of the engine protocol that scoring uses."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config

    @torch.inference_mode()
    def logprobs(self, sequences: Any) -> list[Any]:
        scored: dict[int, Any] = {}
        for members in group_by_length([len(ids) - 1 for ids in sequences], 2048):
            longest = max(len(sequences[i]) for i in members)
            tokens = np.zeros((len(members), longest), dtype=np.int64)
            for row, i in enumerate(members):
                tokens[row, : len(sequences[i])] = sequences[i]
            rows = torch.from_numpy(tokens)
            logits, _ = self.model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
            nats = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").numpy()
            for row, i in enumerate(members):
                scored[i] = -nats[row, : len(sequences[i]) - 1]
        return [scored[i] for i in range(len(sequences))]


def report(options: argparse.Namespace, names: list[str]) -> None:
    """Print the table and the JSON line of finished runs; draw the plot."""
    results = []
    print(f"{'run':32} {'tokens':>12} {'seconds':>9} {'bits per byte':>14}")
    for name in names:
        last_record, elapsed = final_record(options.out / name), training_seconds(options.out / name)
        tokens, score = last_record["tokens"], last_record["val_bits_per_byte"]
        print(f"{name:32} {tokens:12,} {elapsed:9,.0f} {score:14.4f}")
        results.append({"run": name, "tokens": tokens, "seconds": elapsed, "bits_per_byte": score})
    draw(options, names)
    environment = {"benchmark": "token_efficiency", "config": options.config, "torch": torch.__version__}
    print(json.dumps(environment | {"results": results}))


def draw(options: argparse.Namespace, names: list[str]) -> None:
    """Plot bits per byte against tokens and against seconds; seeds of one configuration share a color."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(name.partition("_seed")[0] for name in names))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for name in names:
        kind = name.partition("_seed")[0]
        *points, last = [r for r in add_elapsed_seconds(read_records(options.out / name)) if "val_bits_per_byte" in r]
        style = {"color": f"C{kinds.index(kind)}", "linestyle": "--" if name.startswith("nanogpt") else "-"}
        label = None if any(other.startswith(kind) for other in names[: names.index(name)]) else legend_label(kind)
        for axes, x, unit in zip(panels, ("tokens", "seconds"), (1e6, 60), strict=True):
            xs, ys = [r[x] / unit for r in points], [r["val_bits_per_byte"] for r in points]
            axes.plot(xs, ys, label=label, linewidth=1.2, **style)
            axes.plot(last[x] / unit, last["val_bits_per_byte"], "o", color=style["color"], markersize=5)
    best = min(final_record(options.out / name)["val_bits_per_byte"] for name in names if name.startswith("nanogpt"))
    for axes, x in zip(panels, ("million training tokens", "minutes of training, one core"), strict=True):
        axes.axhline(best, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=x, ylim=(None, 1.3))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="bits per byte (lines: 200 stories, dots: all)")
    panels[0].legend(fontsize=9)
    figure.savefig(options.out / ("tuning.png" if options.tune else "curves.png"), dpi=120)


def legend_label(kind: str) -> str:
    implementation, *rest = kind.split("_")
    return (
        f"nanoGPT, AdamW {rest[0]}, {rest[1]} rows per step"
        if implementation == "nanogpt"
        else f"ours, {rest[0]} tokens"
    )


def add_elapsed_seconds(run_records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records, each with the seconds of training up to it."""
    elapsed = 0.0
    return [record | {"seconds": (elapsed := max(elapsed, record.get("seconds", 0.0)))} for record in run_records]


if __name__ == "__main__":
    run_main(main)
