"""Memory of training: peak resident size of two whole optimizer steps, this project against nanoGPT's model.

Each measurement is a process of its own (Linux: VmHWM of /proc/self/status), with random tokens and AdamW for both. The
second step is the one that counts: only then the optimizer's moments lie beside the activations. Prints a table, ratios
and one JSON line. nanoGPT at 64 x 256 needs 20 GB: --peer-micro-batch measures it at smaller ones.

nanoGPT's model.py is not part of this project: name the one of a checkout.

    python benchmarks/memory.py --nanogpt nanoGPT/model.py --config seed-89m --micro-batch 16,64
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peers import nanogpt, nanogpt_optimizer
from program import as_program

from tinystories.config import OptimConfig, load_config
from tinystories.model import GPT
from tinystories.model.loss import Objective
from tinystories.train.estimate import train_bytes
from tinystories.train.optim import build_optimizers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="model.py of a nanoGPT checkout")
    parser.add_argument("--config", default="seed-89m", help="preset; nanoGPT has its layers, width, heads")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--micro-batch", default="16,64", help="rows of a pass, several with commas")
    parser.add_argument("--peer-micro-batch", help="other rows for nanoGPT")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one measurement in this process: who,rows
    options = parser.parse_args()
    if options.one:
        who, rows = options.one.split(",")
        measure(options, who, int(rows))
        return
    own = [("ours", int(rows)) for rows in options.micro_batch.split(",")]
    peer = [("nanogpt", int(rows)) for rows in (options.peer_micro_batch or options.micro_batch).split(",")]
    results = [in_process(options, who, rows) for who, rows in own + peer]
    print(f"\n{options.config}, {options.context} tokens a row, vocabulary {options.vocab:,}, fp32")
    print(f"{'':10} {'rows':>6} {'peak GB':>9} {'s/step':>8} {'/ nanoGPT':>10}")
    peaks = {(r["who"], r["rows"]): r["peak_gb"] for r in results}
    for found in results:
        beside = peaks.get(("nanogpt", found["rows"]))
        found["ratio"] = round(found["peak_gb"] / beside, 3) if beside else None
        shown = f"{found['ratio']:.2f}" if beside else ""
        print(f"{found['who']:10} {found['rows']:6} {found['peak_gb']:9.2f} {found['seconds']:8.1f} {shown:>10}")
    print(json.dumps({"benchmark": "memory", "config": options.config, "torch": torch.__version__, "results": results}))


def in_process(options: argparse.Namespace, who: str, rows: int) -> dict[str, Any]:
    given = ["--nanogpt", options.nanogpt, "--config", options.config, "--context", options.context]
    words = [sys.executable, __file__, *map(str, given), "--vocab", str(options.vocab), "--one", f"{who},{rows}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{who} with {rows} rows ended with {done.returncode} (out of memory?): {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace, who: str, rows: int) -> None:
    config = load_config(options.config)
    shape = dataclasses.replace(config.model, n_ctx=options.context, vocab_size=options.vocab, dropout=0.0)
    tokens = torch.randint(shape.vocab_size, (rows, options.context + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if who == "ours":
        model: Any = GPT(shape)
        objective = Objective(model)
        optimizers = build_optimizers(model, OptimConfig(kind="adamw", learning_rate=1e-3, muon_rate=0.02))
        estimate = train_bytes(dataclasses.replace(config, model=shape), rows) / 1e9
    else:
        model = nanogpt(
            options.nanogpt, n_layer=shape.n_layer, n_embd=shape.n_embd, n_head=shape.n_head,
            block_size=options.context, vocab_size=shape.vocab_size, dropout=0.0, bias=False,
        )  # fmt: skip
        optimizers = [nanogpt_optimizer(model, 1e-3, (0.9, 0.95), "cpu")]
        estimate = None
    for _ in range(2):
        began = time.perf_counter()
        loss = objective(inputs, targets) / targets.numel() if who == "ours" else model(inputs, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
    print(
        json.dumps({"who": who, "rows": rows, "peak_gb": round(peak, 3), "seconds": seconds, "estimate_gb": estimate})
    )


if __name__ == "__main__":
    as_program(main)
