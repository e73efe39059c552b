"""Training on a CPU: speed of whole optimizer steps on each route, and their memory, against nanoGPT's model.

One command measures everything and prints each goal beside what was reached: two shapes (6 x 240 with 4,096 ids,
12 x 512 with 50,257) with one and two threads, both with one thread of a processor limited to AVX2, and the peak memory
of a step of seed-89m. On a quiet machine with two cores this takes less than 20 minutes and 20 GB.

Each case is a process of its own. In it all variants run interleaved (A B A B ...) with the same batch and AdamW:
nanoGPT in fp32, in fp32 through oneDNN, under autocast in bf16, and with --compile compiled; ours (`modern`) on every
route that the processor has, on some also with Muon. 12 x 512, whose steps take ten times as long, has only the
variants that its goals need, and half the rounds. A ratio is the median over the rounds of the time of a nanoGPT
variant divided by ours in the same round. oneDNN's fp32 matmuls are an option that nanoGPT's own training script does
not set.

The limit to AVX2 is set by environment variables (`LIMITS`): PyTorch's, oneDNN's, MKL's and Numba's.

Seconds are wall-clock seconds. --cpu-seconds counts the processor time of the process instead, for a busy machine; with
more than one thread it is the sum over the threads.

nanoGPT's model.py is not part of this project: pass the path to a checkout.

    python benchmarks/train_cpu.py --nanogpt nanoGPT/model.py --compile   # everything, on a quiet machine
    python benchmarks/train_cpu.py --nanogpt nanoGPT/model.py --shapes 6x240 --threads 1 --limits native --runs 3
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nanogpt import build_nanogpt_optimizer, load_nanogpt
from script import run_main

from tinystories.config import Config, ModelConfig, OptimConfig, TrainConfig
from tinystories.engine.cpu.target import LEVELS
from tinystories.engine.device import has_native_bf16, read_cpu_info
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.train.optimizer.build import build_optimizers
from tinystories.train.route import ROUTES, Route, build_objective, list_possible_routes

# Shape: heads, vocabulary.
SHAPES = {"6x240": (6, 4096), "12x512": (8, 50257)}
CONTEXT = 256
# Environment variables that limit PyTorch, oneDNN, MKL and Numba to the instructions of a processor with AVX2 alone.
LIMITS = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": LEVELS["avx2"].processor,
        "NUMBA_CPU_FEATURES": LEVELS["avx2"].features,
    },
}
# The variants of 12 x 512 by limit.
LARGE = {"native": r"nanoGPT (fp32|bf16|bf16 compiled)|ours bf16-cpu", "avx2": r"nanoGPT fp32|ours (fp32|fp32-cpu)"}
WITH_MUON = ("fp32", "bf16-cpu")
# (limit, shape, precision of ours, nanoGPT's) -> required ratio of our fastest route. "best": nanoGPT's fastest.
BARS = {
    ("native", "6x240", "bf16", "fp32"): 2.5,
    ("native", "12x512", "bf16", "fp32"): 3.2,
    ("native", "6x240", "bf16", "best"): 1.1,
    ("native", "12x512", "bf16", "best"): 1.1,
    ("avx2", "6x240", "fp32", "fp32"): 1.1,
    ("avx2", "12x512", "fp32", "fp32"): 1.35,
}
MEMORY_BAR = 0.34  # of nanoGPT's peak: a third

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="model.py of a nanoGPT checkout")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated: 6x240, 12x512")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma-separated")
    parser.add_argument("--limits", default=",".join(LIMITS), help="comma-separated: native; avx2, with one thread")
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens per step")
    parser.add_argument("--runs", type=int, default=7, help="rounds; each variant takes one step per round")
    parser.add_argument("--compile", action="store_true", help="also run compiled variants of nanoGPT")
    parser.add_argument("--cpu-seconds", action="store_true", help="count processor time instead of wall-clock time")
    parser.add_argument("--only", default="", help="regular expression: only variants whose name it matches")
    parser.add_argument(
        "--memory-rows", type=int, default=64, help="rows of the step whose memory is measured; 0: none"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options, options.case)))
        return
    results, bars = [], []
    for limit in options.limits.split(","):
        for shape in options.shapes.split(","):
            if limit not in LIMITS or shape not in SHAPES:
                raise UserError(
                    f"unknown case {limit} {shape}; limits: {', '.join(LIMITS)}; shapes: {', '.join(SHAPES)}"
                )
            for threads in options.threads.split(",") if limit == "native" else ["1"]:
                result = start_case(limit, shape, threads)
                print_case(result)
                results.append(result)
                bars += list_bars(result)
    memory = measure_memory(options.nanogpt, options.memory_rows) if options.memory_rows else None
    print(f"\n{'goal':64} {'required':>8} {'reached':>8}")
    for name, required, ratio in bars:
        print(f"{name:64} {required:8.2f} {ratio:8.2f}{'' if ratio >= required else '  missed'}")
    if memory is not None:
        name = f"memory of seed-89m, {memory['rows']} x {CONTEXT}: ours {memory['route']} / nanoGPT, at most"
        ratio = memory["ratio"]
        print(f"{name:64} {MEMORY_BAR:8.2f} {ratio:8.2f}{'' if ratio <= MEMORY_BAR else '  missed'}")
    print(
        json.dumps(
            {"benchmark": "train_cpu", "torch": torch.__version__, "results": results, "memory": memory, "bars": bars}
        )
    )


def measure_memory(nanogpt: Path, rows: int) -> dict[str, Any]:
    """Run `memory.py`: the peak of a step of ours, in bf16 where that is native, over nanoGPT's."""
    route = "bf16-cpu" if has_native_bf16(read_cpu_info()) else "fp32"
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), "--nanogpt", str(nanogpt), "--micro-batch", str(rows), "--route", route]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"memory.py: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    print(done.stdout.rpartition("\n{")[0], flush=True)
    peaks = {result["who"]: result["peak_gb"] for result in json.loads(done.stdout.splitlines()[-1])["results"]}
    return {"rows": rows, "route": route, "peak_gb": peaks, "ratio": peaks["ours"] / peaks["nanogpt"]}


def start_case(limit: str, shape: str, threads: str) -> dict[str, Any]:
    """Run one case in its own process, since the environment counts when torch is imported."""
    command = [sys.executable, *sys.argv, "--case", f"{limit} {shape} {threads}"]
    environment = os.environ | LIMITS[limit]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{limit} {shape}, {threads} threads: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_case(options: argparse.Namespace, case: str) -> dict[str, Any]:
    """Time all variants of a case, interleaved."""
    limit, shape, threads = case.split()
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    heads, vocab = SHAPES[shape]
    n_layer, n_embd = map(int, shape.split("x"))
    tokens = torch.randint(vocab, (options.rows, CONTEXT + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    steps: dict[str, Step] = {}
    is_large = shape == "12x512"

    def add(name: str, build: Callable[[], Step]) -> None:
        if re.search(options.only, name) and (not is_large or re.fullmatch(LARGE[limit], name)):
            steps[name] = build()

    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": heads, "vocab_size": vocab}
    n_ff = round(8 * n_embd / 3 / 8) * 8
    model_config = ModelConfig(**sizes, n_ff=n_ff, n_ctx=CONTEXT)  # type: ignore[arg-type]
    config = Config(model=model_config, train=TrainConfig(batch_size=options.rows, micro_batch=options.rows))
    names = list_possible_routes(config, torch.device("cpu"))
    if limit == "avx2":
        names = [name for name in names if name in ("fp32", "fp32-cpu")]
    for name in names:
        if name.endswith("-cpu"):  # our own kernels
            continue
        add(f"nanoGPT {name}", lambda r=ROUTES[name]: make_nanogpt_step(options.nanogpt, sizes, r, batch, False))
        if options.compile and name != "fp32-onednn":
            add(
                f"nanoGPT {name} compiled",
                lambda r=ROUTES[name]: make_nanogpt_step(options.nanogpt, sizes, r, batch, True),
            )
    for kind in ("adamw", "muon"):
        optim = OptimConfig(kind=kind, learning_rate=1e-3, muon_rate=0.02)
        for name in names if kind == "adamw" else [name for name in names if name in WITH_MUON]:
            label = f"ours {name}{' Muon' * (kind == 'muon')}"
            add(label, lambda r=ROUTES[name], o=optim: make_step(config, o, r, batch))

    clock = time.process_time if options.cpu_seconds else time.perf_counter
    for step in steps.values():  # warm up; compile
        for _ in range(1 if is_large else 2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.runs // 2 if is_large else options.runs):
        for name, step in steps.items():
            started_at = clock()
            step()
            seconds[name].append(clock() - started_at)
    case_names = {"limit": limit, "shape": shape, "threads": int(threads), "tokens": options.rows * CONTEXT}
    return case_names | {"cpu_seconds": options.cpu_seconds, "seconds": seconds}


def make_step(config: Config, optim: OptimConfig, route: Route, batch: tuple[torch.Tensor, torch.Tensor]) -> Step:
    """Return a function that runs one optimizer step of ours on a route."""
    model = GPT(config.model)
    objective = build_objective(model, route)
    optimizers = build_optimizers(model, optim, cpu_kernels=route.has_bf16_kernels)

    def compute_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = objective(inputs, targets)
        return loss / targets.numel()

    return wrap_step(compute_loss, model, optimizers, route, batch)


def make_nanogpt_step(
    path: Path, sizes: dict[str, int], route: Route, batch: tuple[torch.Tensor, torch.Tensor], compiled: bool
) -> Step:
    model = load_nanogpt(path, **sizes, block_size=CONTEXT, dropout=0.0, bias=False)
    forward = torch.compile(model) if compiled else model
    optimizers = [build_nanogpt_optimizer(model, 1e-3, (0.9, 0.95), "cpu")]
    return wrap_step(lambda inputs, targets: forward(inputs, targets)[1], model, optimizers, route, batch)


def wrap_step(
    compute_loss: Callable[..., torch.Tensor],
    model: torch.nn.Module,
    optimizers: Any,
    route: Route,
    batch: tuple[torch.Tensor, torch.Tensor],
) -> Step:
    def step() -> None:
        with route.matmuls():
            with torch.autocast("cpu", torch.bfloat16, enabled=route.precision == "bf16"):
                loss = compute_loss(*batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return step


def compute_ratio(seconds: dict[str, list[float]], ours: str, competitor: str) -> float:
    """Return the median over the rounds of how many times as fast ours is."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[competitor], strict=True))


def print_case(result: dict[str, Any]) -> None:
    seconds: dict[str, list[float]] = result["seconds"]
    unit = "CPU seconds" if result["cpu_seconds"] else "seconds"
    print(f"\n{result['limit']}, {result['shape']}, {result['threads']} thread(s), {unit}")
    print(f"{'variant':32} {'tokens/s':>10} {'/ nanoGPT fp32':>15} {'min':>8} {'max':>8}")
    for name, times in seconds.items():
        ratio = f"{compute_ratio(seconds, name, 'nanoGPT fp32'):.2f}" if "nanoGPT fp32" in seconds else ""
        rate = result["tokens"] / statistics.median(times)
        print(f"{name:32} {rate:10,.0f} {ratio:>15} {min(times):8.3f} {max(times):8.3f}", flush=True)


def list_bars(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (name, required, reached) of the goals of a case; those whose variants --only excludes are left out."""
    seconds: dict[str, list[float]] = result["seconds"]
    bars = []
    for (limit, shape, precision, competitor), required in BARS.items():
        if (limit, shape) != (result["limit"], result["shape"]):
            continue
        ours = [name for name in seconds if name.startswith(f"ours {precision}") and not name.endswith("Muon")]
        others = [
            name
            for name in seconds
            if name.startswith("nanoGPT") and competitor in ("best", name.removeprefix("nanoGPT "))
        ]
        if ours and others:
            fastest, other = (min(names, key=lambda name: statistics.median(seconds[name])) for names in (ours, others))
            name = f"{limit} {shape}, {result['threads']} thread(s): {fastest} / nanoGPT {competitor}"
            bars.append((name, required, compute_ratio(seconds, fastest, other)))
    return bars


if __name__ == "__main__":
    run_main(main)
