"""Training speed: tokens per second of whole optimizer steps, this project against nanoGPT's model.

Both run interleaved in one process (A B A B ...) with the same shape, batch and precision: forward, backward, gradient
clipping at 1.0 and AdamW (0.9, 0.95, weight decay 0.1; fused for both), on random tokens. nanoGPT is tuned: both of its
`bias` settings run, also compiled with --compile, and its fastest variant counts. Ours is `classic` (the same matmuls
as nanoGPT: 4x MLP) and `modern` (SwiGLU of the same size). A ratio is the median over the rounds of the time of
nanoGPT's fastest variant (by its median) divided by ours, so that changes in machine speed affect both. Prints a table
and a JSON line for each micro-batch.

nanoGPT ties its output head to the embedding, and so do we unless --untied, as in the presets with 89M parameters: the
matmuls are the same, but AdamW then updates one more matrix of the vocabulary's size, which counts against us. On CUDA,
nanoGPT can also run with a vocabulary padded to a multiple of 64 (--peer-vocab 50304), with the ids of the smaller one.

On CUDA the peak memory is reported as well: a variant's weights and optimizer state plus what its step needs in
addition. MFU counts the model's own FLOPs (train/estimate.py), relative to the dense bf16 peak of the vendor's data
sheet. The inputs are already on the device; the throughput of whole runs is in their metrics.jsonl.

Compilation takes longest. --compile-jobs N first compiles every variant in its own process, N in parallel; each prints
the seconds from its start to the end of its first step, and leaves its code in the compiler's cache for the process
that measures. With --first-steps, only this is done.

nanoGPT's model.py is not part of this project: pass the path to a checkout.

    python benchmarks/train.py --nanogpt nanoGPT/model.py --shape 12x512 --vocab 50257
    python benchmarks/train.py --nanogpt nanoGPT/model.py --shape 6x240 --heads 6 --vocab 4096 --compile
    python benchmarks/train.py --nanogpt nanoGPT/model.py --device cuda --compile --micro-batch 16,32,64 --steps 20 \\
      --shape 12x512 --heads 8 --context 512 --vocab 50257 --peer-vocab 50257,50304 --untied    # seed- and modern-89m
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from nanogpt import build_nanogpt_optimizer, load_nanogpt
from script import run_main

from tinystories.config import ModelConfig, OptimConfig
from tinystories.engine.device import select_precision
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.model.loss import Objective
from tinystories.train.estimate import estimate_flops_per_token
from tinystories.train.optimizer.build import Optimizers, build_optimizers

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense FLOP/s from the vendors' data sheets

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """One model to measure, compiled or not, with its optimizers."""

    name: str
    compute_loss: LossFunction
    model: torch.nn.Module
    optimizers: Optimizers
    flops_per_token: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="model.py of a nanoGPT checkout")
    parser.add_argument("--shape", default="6x240", help="layers x width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--peer-vocab", help="nanoGPT's vocabulary sizes, comma-separated  [default: --vocab]")
    parser.add_argument("--untied", action="store_true", help="do not tie our output head; nanoGPT's is always tied")
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="dropout of both; nanoGPT also drops attention weights"
    )
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--micro-batch", default="8", help="rows per step, comma-separated")
    parser.add_argument("--runs", type=int, default=5, help="rounds; each variant is timed once per round")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps timed together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="also run compiled variants of both")
    parser.add_argument("--muon", action="store_true", help="train our blocks' matrices with Muon")
    parser.add_argument("--only", default="", help="regular expression: only variants whose name it matches")
    parser.add_argument("--peer-bias", default="false,true", help="nanoGPT's `bias`: one setting or both")
    parser.add_argument(
        "--compile-jobs", type=int, default=0, help="compile beforehand, this many variants in parallel"
    )
    parser.add_argument("--first-steps", action="store_true", help="only run and time the first step of each variant")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # as nanoGPT's train.py does
    torch.manual_seed(0)
    micro_batches = [int(rows) for rows in options.micro_batch.split(",")]
    if options.compile_jobs:
        compile_ahead(options, micro_batches)
    elif options.first_steps:
        for rows in micro_batches:
            print_first_steps(options, device, rows)
    if options.first_steps:
        return
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    environment = {"benchmark": "train", "machine": machine, "threads": options.threads, "torch": torch.__version__}
    for rows in micro_batches:
        print(json.dumps(environment | {"results": [compare(options, device, rows)]}), flush=True)


def print_first_steps(options: argparse.Namespace, device: torch.device, rows: int) -> None:
    """Run the first step of each variant, and print a JSON line for each."""
    inputs, targets = random_batch(options, device, rows)
    for variant in build_variants(options, device):
        start_time = time.perf_counter()
        make_step(variant, inputs, targets)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, since_start = time.perf_counter() - start_time, time.time() - psutil.Process().create_time()
        labels = {"benchmark": "first step", "variant": variant.name, "micro_batch": rows}
        print(json.dumps(labels | {"seconds": seconds, "seconds_since_start": since_start}), flush=True)


def compile_ahead(options: argparse.Namespace, micro_batches: list[int]) -> None:
    """Run the first step of each compiled variant in its own process."""
    names = [f"ours {architecture} compiled" for architecture in ("classic", "modern")]
    names += [f"{nanogpt_name(options, *peer)} compiled" for peer in list_nanogpt_variants(options)]

    def run_first_step(rows: int, name: str) -> None:
        extra_arguments = [
            "--micro-batch",
            str(rows),
            "--only",
            f"^{re.escape(name)}$",
            "--first-steps",
            "--compile-jobs",
            "0",
        ]
        completed = subprocess.run(
            [sys.executable, *sys.argv, *extra_arguments], capture_output=True, text=True, check=False
        )
        last = (completed.stdout.strip() or completed.stderr.strip() or "no output").splitlines()[-1]
        print(last if completed.returncode == 0 else f"{name}, {rows} rows: {last}", flush=True)

    with ThreadPoolExecutor(options.compile_jobs) as pool:
        jobs = [(rows, name) for rows in micro_batches for name in names if re.search(options.only, name)]
        list(pool.map(lambda job: run_first_step(*job), jobs))


def random_batch(options: argparse.Namespace, device: torch.device, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(options.vocab, (rows, options.context + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def list_nanogpt_variants(options: argparse.Namespace) -> list[tuple[bool, int]]:
    """Return (bias, vocabulary size) of each nanoGPT variant."""
    vocabs = [int(size) for size in (options.peer_vocab or str(options.vocab)).split(",")]
    return [(bias == "true", vocab) for bias in options.peer_bias.split(",") for vocab in vocabs]


def nanogpt_name(options: argparse.Namespace, bias: bool, vocab: int) -> str:
    several = "," in (options.peer_vocab or "")
    return f"nanoGPT bias={bias}{f' V={vocab}' * several}"


def build_variants(options: argparse.Namespace, device: torch.device) -> Iterator[Variant]:
    """Yield the variants that the options select, building each on demand."""
    name_pattern = re.compile(options.only)
    n_layer, n_embd = map(int, options.shape.split("x"))
    compile_choices = (False, True) if options.compile else (False,)
    flops = {}
    for architecture in ("classic", "modern"):
        # SwiGLU has three matrices: at two thirds of the width it has as many weights as the 4x MLP.
        n_ff = 4 * n_embd if architecture == "classic" else round(8 * n_embd / 3 / 8) * 8
        config = ModelConfig(
            architecture=architecture, n_layer=n_layer, n_embd=n_embd, n_head=options.heads, n_ff=n_ff,
            n_ctx=options.context, vocab_size=options.vocab, tied=not options.untied, dropout=options.dropout,
        )  # fmt: skip
        flops[architecture] = estimate_flops_per_token(config)
        for compiled in compile_choices:
            name = f"ours {architecture}{' compiled' * compiled}"
            if not name_pattern.search(name):
                continue
            model = GPT(config).to(device)
            objective = torch.compile(Objective(model)) if compiled else Objective(model)
            kind: Literal["muon", "adamw"] = "muon" if options.muon else "adamw"
            optimizers = build_optimizers(model, OptimConfig(kind=kind, learning_rate=1e-3, muon_rate=0.02))
            yield Variant(name, wrap_summed_loss(objective), model, optimizers, flops[architecture])
    for bias, vocab in list_nanogpt_variants(options):
        for compiled in compile_choices:
            name = f"{nanogpt_name(options, bias, vocab)}{' compiled' * compiled}"
            if not name_pattern.search(name):
                continue
            nanogpt_model = load_nanogpt(
                options.nanogpt, n_layer=n_layer, n_embd=n_embd, n_head=options.heads, block_size=options.context,
                vocab_size=vocab, dropout=options.dropout, bias=bias,
            ).to(device)  # fmt: skip
            forward = torch.compile(nanogpt_model) if compiled else nanogpt_model
            optimizers = [build_nanogpt_optimizer(nanogpt_model, 1e-3, (0.9, 0.95), device.type)]
            # The same matmuls as `classic`, except for a vocabulary up to 0.1 % larger.
            yield Variant(name, wrap_nanogpt_loss(forward), nanogpt_model, optimizers, flops["classic"])


def compare(options: argparse.Namespace, device: torch.device, rows: int) -> dict[str, Any]:
    """Time all variants at one micro-batch; return medians, and ratios to nanoGPT's fastest."""
    torch._dynamo.reset()  # otherwise a second micro-batch size triggers compilation for dynamic shapes
    inputs, targets = random_batch(options, device, rows)
    variants_by_name = {variant.name: variant for variant in build_variants(options, device)}
    if not any(name.startswith("nanoGPT") for name in variants_by_name):
        raise UserError(
            f"--only {options.only!r} excludes every nanoGPT variant; at least one is needed as the baseline"
        )
    step_functions = {name: make_step(variant, inputs, targets) for name, variant in variants_by_name.items()}
    seconds, extra_bytes = time_interleaved(step_functions, options.runs, options.steps, device)
    peaks = {
        name: extra_bytes[name] + state_bytes(variants_by_name[name].model, variants_by_name[name].optimizers)
        for name in extra_bytes
    }
    flops = {name: variant.flops_per_token for name, variant in variants_by_name.items()}
    return report(options, rows, seconds, flops, peaks, device)


def wrap_summed_loss(summed: Callable[..., torch.Tensor]) -> LossFunction:
    return lambda inputs, targets: summed(inputs, targets) / targets.numel()


def wrap_nanogpt_loss(logits_and_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> LossFunction:
    return lambda inputs, targets: logits_and_loss(inputs, targets)[1]


def make_step(variant: Variant, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs one optimizer step."""
    bf16 = select_precision(inputs.device) == "bf16"

    def step() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            loss = variant.compute_loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(variant.model.parameters(), 1.0)
        for optimizer in variant.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def time_interleaved(
    step_functions: dict[str, Callable[[], None]], runs: int, steps: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds per step of each variant in each round, after two warmup steps each.

    On CUDA, also return the peak bytes that a step allocates in addition to weights and optimizer state.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    extra_bytes: dict[str, int] = {}
    for name, step in step_functions.items():
        step()
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            allocated_before = torch.cuda.memory_allocated(device)
            step()
            extra_bytes[name] = torch.cuda.max_memory_allocated(device) - allocated_before
    seconds: dict[str, list[float]] = {name: [] for name in step_functions}
    for _ in range(runs):
        for name, step in step_functions.items():
            synchronize()
            start_time = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize()
            seconds[name].append((time.perf_counter() - start_time) / steps)
    return seconds, extra_bytes


def state_bytes(model: torch.nn.Module, optimizers: Optimizers) -> int:
    """Return the bytes of weights, buffers and optimizer state, which persist between steps."""
    entries = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    moments = [tensor for entry in entries for tensor in entry.values() if torch.is_tensor(tensor)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))


def report(
    options: argparse.Namespace,
    rows: int,
    seconds: dict[str, list[float]],
    flops: dict[str, float],
    peaks: dict[str, int],
    device: torch.device,
) -> dict[str, Any]:
    """Print the table for one micro-batch size, and return it for the JSON line."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest_nanogpt = min((name for name in medians if name.startswith("nanoGPT")), key=medians.__getitem__)
    ratios = {
        name: sorted(b / a for a, b in zip(times, seconds[fastest_nanogpt], strict=True))
        for name, times in seconds.items()
    }
    rates = {name: rows * options.context / median for name, median in medians.items()}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flop for name, flop in PEAK_BF16.items() if name in device_name), None)
    print(f"\n{options.shape}, {options.heads} heads, vocabulary {options.vocab:,}, {rows} x {options.context} tokens")
    print(f"{'variant':38} {'tokens/s':>12} {'/ nanoGPT':>10} {'min':>6} {'max':>6} {'MFU':>6} {'GB':>6}")
    for name, rate in rates.items():
        ratio = ratios[name]
        mfu = f"{rate * flops[name] / peak:.1%}" if peak else ""
        memory = f"{peaks[name] / 1e9:.1f}" if peaks else ""
        spread = f"{statistics.median(ratio):10.2f} {ratio[0]:6.2f} {ratio[-1]:6.2f}"
        print(f"{name:38} {rate:12,.0f} {spread} {mfu:>6} {memory:>6}")
    return {
        "shape": options.shape,
        "heads": options.heads,
        "vocab": options.vocab,
        "context": options.context,
        "micro_batch": rows,
        "untied": options.untied,
        "dropout": options.dropout,
        "peer": fastest_nanogpt,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(statistics.median(ratios[name]), 3) for name in rates if name.startswith("ours")},
        "mfu": {name: round(rate * flops[name] / peak, 4) for name, rate in rates.items()} if peak else {},
        "peak_gb": {name: round(n_bytes / 1e9, 3) for name, n_bytes in peaks.items()},
    }


if __name__ == "__main__":
    run_main(main)
