"""Memory of training: peak resident size of two whole optimizer steps, this project against nanoGPT's model.

Each measurement runs in its own process (Linux: VmHWM of /proc/self/status), with random tokens and AdamW for both. The
second step sets the peak: only then do the optimizer's moments exist along with the activations. Prints a table with
ratios and one JSON line. nanoGPT at 64 x 256 needs 20 GB: --peer-micro-batch measures it at smaller sizes.

nanoGPT's model.py is not part of this project: pass the path to a checkout.

    python benchmarks/memory.py --nanogpt nanoGPT/model.py --config seed-89m --micro-batch 16,64
    python benchmarks/memory.py --nanogpt nanoGPT/model.py --config seed-89m --micro-batch 16,64 --route bf16-cpu
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
from nanogpt import build_nanogpt_optimizer, load_nanogpt
from script import run_main

from tinystories.config import OptimConfig
from tinystories.config_file import load_config
from tinystories.model import GPT
from tinystories.train.estimate import estimate_train_bytes
from tinystories.train.optimizer.build import build_optimizers
from tinystories.train.route import ROUTES, build_objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="model.py of a nanoGPT checkout")
    parser.add_argument("--config", default="seed-89m", help="preset; nanoGPT uses its layers, width and heads")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--micro-batch", default="16,64", help="rows per pass, comma-separated")
    parser.add_argument(
        "--peer-micro-batch", help="rows per pass for nanoGPT, comma-separated  [default: --micro-batch]"
    )
    parser.add_argument("--route", default="fp32", choices=ROUTES, help="how ours computes; nanoGPT computes in fp32")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one measurement in this process: who,rows
    options = parser.parse_args()
    if options.one:
        implementation, rows = options.one.split(",")
        measure(options, implementation, int(rows))
        return
    our_cases = [("ours", int(rows)) for rows in options.micro_batch.split(",")]
    nanogpt_cases = [("nanogpt", int(rows)) for rows in (options.peer_micro_batch or options.micro_batch).split(",")]
    results = [measure_in_subprocess(options, who, rows) for who, rows in our_cases + nanogpt_cases]
    print(f"\n{options.config}, {options.context} tokens a row, vocabulary {options.vocab:,}, {options.route}")
    print(f"{'':10} {'rows':>6} {'peak GB':>9} {'s/step':>8} {'/ nanoGPT':>10}")
    peaks = {(r["who"], r["rows"]): r["peak_gb"] for r in results}
    for result in results:
        nanogpt_peak = peaks.get(("nanogpt", result["rows"]))
        result["ratio"] = round(result["peak_gb"] / nanogpt_peak, 3) if nanogpt_peak else None
        ratio_text = f"{result['ratio']:.2f}" if nanogpt_peak else ""
        print(
            f"{result['who']:10} {result['rows']:6} {result['peak_gb']:9.2f} {result['seconds']:8.1f} {ratio_text:>10}"
        )
    print(json.dumps({"benchmark": "memory", "config": options.config, "torch": torch.__version__, "results": results}))


def measure_in_subprocess(options: argparse.Namespace, implementation: str, rows: int) -> dict[str, Any]:
    arguments = ["--nanogpt", options.nanogpt, "--config", options.config, "--context", options.context]
    command = [
        sys.executable,
        __file__,
        *map(str, arguments),
        "--vocab",
        str(options.vocab),
        "--route",
        options.route,
        "--one",
        f"{implementation},{rows}",
    ]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        reason = f"exit code {completed.returncode} (out of memory?): {completed.stderr[-300:]}"
        sys.exit(f"{implementation} with {rows} rows failed with {reason}")
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def measure(options: argparse.Namespace, implementation: str, rows: int) -> None:
    config = load_config(options.config)
    model_config = dataclasses.replace(config.model, n_ctx=options.context, vocab_size=options.vocab, dropout=0.0)
    tokens = torch.randint(model_config.vocab_size, (rows, options.context + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    route = ROUTES[options.route if implementation == "ours" else "fp32"]
    if implementation == "ours":
        model: Any = GPT(model_config)
        objective = build_objective(model, route)
        optimizers = build_optimizers(model, OptimConfig(kind="adamw", learning_rate=1e-3, muon_rate=0.02))
        estimate = estimate_train_bytes(dataclasses.replace(config, model=model_config), rows) / 1e9
    else:
        model = load_nanogpt(
            options.nanogpt, n_layer=model_config.n_layer, n_embd=model_config.n_embd, n_head=model_config.n_head,
            block_size=options.context, vocab_size=model_config.vocab_size, dropout=0.0, bias=False,
        )  # fmt: skip
        optimizers = [build_nanogpt_optimizer(model, 1e-3, (0.9, 0.95), "cpu")]
        estimate = None
    for _ in range(2):
        start_time = time.perf_counter()
        with route.matmuls():
            with torch.autocast("cpu", torch.bfloat16, enabled=route.precision == "bf16"):
                loss = (
                    objective(inputs, targets) / targets.numel()
                    if implementation == "ours"
                    else model(inputs, targets)[1]
                )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start_time
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
    print(
        json.dumps(
            {
                "who": implementation,
                "rows": rows,
                "peak_gb": round(peak, 3),
                "seconds": seconds,
                "estimate_gb": estimate,
            }
        )
    )


if __name__ == "__main__":
    run_main(main)
