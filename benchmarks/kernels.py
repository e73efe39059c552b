"""The kernels of the CPU engine in two trees, this one and `--base` (a checkout of another commit), interleaved.

Each tree runs in a process of its own, one after the other in every round, with one thread. Prints medians of both and
of the ratios of the rounds, whether the results are equal bit for bit, and then one JSON line. Seconds are those of the
processor, not of the clock, so that other programs on the machine matter less.

    python benchmarks/kernels.py matmul --base ../base                 G multiply-adds/s of single matrices
    python benchmarks/kernels.py engine --base ../base                 tokens/s of the bundled model
    python benchmarks/kernels.py engine --base ../base --preset modern-89m --vocab 50257     of random weights
    python benchmarks/kernels.py engine --base . --precision int8-a8 --base-precision int8   two precisions of this tree

Matrices are read from memory as in a model: as many copies, one after the other, as fill the cache (`--working-set`).
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from script import run_main

from tinystories.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# Bytes of weights that are read in turns: more than a core's own caches, and more than all caches.
WORKING_SETS = {"240x240": 5e6, "640x240": 5e6, "240x640": 5e6, "4096x240": 5e6}
MIN_SECONDS = 0.03  # of a measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["matmul", "engine"])
    parser.add_argument("--base", type=Path, help="root of a checkout of the commit to compare with")
    parser.add_argument("--precision", default="int8", choices=["int8", "int8-a8", "int4", "fp32"])
    parser.add_argument("--base-precision", choices=["int8", "int8-a8", "int4", "fp32"], help="default: --precision")
    parser.add_argument("--shapes", default="240x240,4096x240,1408x512,50257x512", help="of matmul: outputs x inputs")
    parser.add_argument("--rows", default="1,8,32,256", help="of matmul: rows of x")
    parser.add_argument(
        "--working-set", type=float, default=100e6, help="of matmul: bytes, for shapes not of `bundled`"
    )
    parser.add_argument("--preset", default="bundled", help="of engine: bundled, or a preset with random weights")
    parser.add_argument("--tasks", default="prompt of 256,one stream,8 streams,32 streams,score 512", help="of engine")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    roots = {"this": ROOT} | ({"base": options.base} if options.base else {})
    precisions = {"this": options.precision, "base": options.base_precision or options.precision}
    workers = {name: Worker(root, precisions[name]) for name, root in roots.items()}
    table = []
    title = " and ".join(dict.fromkeys(precisions[name] for name in workers))
    if options.what == "matmul":
        cases = [(shape, rows) for shape in options.shapes.split(",") for rows in options.rows.split(",")]
        print(f"{title}, G multiply-adds/s", flush=True)
    else:
        cases = [(task, "") for task in options.tasks.split(",")]
        print(f"{options.preset} {title}, tokens/s", flush=True)
    for case in cases:
        rates: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                rates[name].append(worker.ask(case))
        row = {"case": " ".join(case).strip(), **{name: statistics.median(values) for name, values in rates.items()}}
        text = f"{row['case']:20}" + "".join(f"{name} {row[name]:10,.1f}   " for name in workers)
        if options.base:
            row["ratio"] = statistics.median(a / b for a, b in zip(rates["this"], rates["base"], strict=True))
            row["equal"] = len({worker.digest for worker in workers.values()}) == 1
            text += f"ratio {row['ratio']:.2f}   {'equal bits' if row['equal'] else 'different bits'}"
        print(text, flush=True)
        table.append(row)
    facts = {"precision": options.precision, "base_precision": precisions["base"]}
    facts["machine"] = platform.processor() or platform.machine()
    print(json.dumps({"benchmark": f"kernels {options.what}", **facts, "preset": options.preset, "rows": table}))


class Worker:
    """A process that measures with the kernels of a tree."""

    def __init__(self, root: Path, precision: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--precision", precision, "--worker"]
        pipe = subprocess.PIPE
        self.root = root
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment, text=True)
        self.digest = ""

    def ask(self, case: tuple[str, str]) -> float:
        """Measure a case once; return its rate and remember the SHA-256 of its results."""
        streams: tuple[IO[str], IO[str]] = (self.process.stdin, self.process.stdout)  # type: ignore[assignment]
        streams[0].write(json.dumps(case) + "\n")
        streams[0].flush()
        answer = streams[1].readline()
        if not answer:
            raise UserError(f"the measurement in {self.root} failed")
        rate, self.digest = json.loads(answer)
        return float(rate)


def work(options: argparse.Namespace) -> None:
    """Answer every case on standard input with its rate and the digest of its results."""
    measure = make_matmul_measurement(options) if options.what == "matmul" else make_engine_measurement(options)
    for line in sys.stdin:
        print(json.dumps(measure(*json.loads(line))), flush=True)


def weights_precision(precision: str) -> str:
    """Return the precision of the weights: int8-a8 has int8 weights."""
    return precision.removesuffix("-a8")


def make_matmul_measurement(options: argparse.Namespace) -> Callable[[str, str], tuple[float, str]]:
    """Compile the matmul of this tree and return a function that measures a shape with a number of rows."""
    import numba

    from tinystories.engine.cpu.kernels import matmul
    from tinystories.engine.cpu.kernels.layout import CALL, KINDS, MATRIX, MODEL
    from tinystories.engine.cpu.kernels.matmul import matmul_rows, quantize_rows
    from tinystories.engine.cpu.kernels.memory import make_context
    from tinystories.weights.quantize import GROUP_SIZE, QUANTIZERS, allocate_aligned, round_up

    base, precision = MODEL.lm_head, weights_precision(options.precision)

    if "source" in inspect.signature(quantize_rows.py_func).parameters:

        @numba.njit(error_model="numpy")
        def quantize_x(m, c, ctx):  # type: ignore[no-untyped-def]
            quantize_rows(m, c, base, ctx.x, m[base + MATRIX.in_features], ctx)

    else:  # until commit 2afd137

        @numba.njit(error_model="numpy")
        def quantize_x(m, c, ctx):  # type: ignore[no-untyped-def]
            quantize_rows(m, c, base, ctx)

    if hasattr(matmul, "KERNELS"):
        kernels = matmul.KERNELS[options.precision]

        @numba.njit(error_model="numpy")
        def make_ctx(c):  # type: ignore[no-untyped-def]
            return make_context(c, kernels, np.float32(0), 0, 1, 0)

    else:  # until commit e04229a

        @numba.njit(error_model="numpy")
        def make_ctx(c):  # type: ignore[no-untyped-def]
            return make_context(c, np.float32(0), 0, 1, 0)

    @numba.njit(error_model="numpy")
    def run(m, c, y, n_copies, n_bytes, n_calls):  # type: ignore[no-untyped-def]
        ctx = make_ctx(c)
        quantize_x(m, c, ctx)
        first = m[base + MATRIX.weights]
        for i in range(n_calls):
            m[base + MATRIX.weights] = first + i % n_copies * n_bytes
            matmul_rows(m, c, base, m[MODEL.n_layer], y, ctx)
        m[base + MATRIX.weights] = first

    def align(array: Any) -> Any:
        aligned = allocate_aligned(array.shape, array.dtype)
        aligned[...] = array
        return aligned

    cache: dict[str, tuple[Any, Any, int]] = {}

    def measure(shape: str, rows: str) -> tuple[float, str]:
        out_features, in_features, n_rows = *map(int, shape.split("x")), int(rows)
        if shape not in cache:
            cache.clear()
            weight = np.random.default_rng(0).standard_normal((out_features, in_features), dtype=np.float32)
            if precision == "fp32":
                values, scales = weight.reshape(-1), np.zeros(1, np.float32)
            else:
                values, scales = QUANTIZERS[precision](weight)
            n_copies = max(1, round(WORKING_SETS.get(shape, options.working_set) / values.nbytes))
            cache[shape] = align(np.tile(values, n_copies)), align(scales), n_copies
        values, scales, n_copies = cache[shape]
        padded_out = len(scales) if precision == "int8" else round_up(out_features, 8)
        m, c = np.zeros(MODEL.layers, np.int64), np.zeros(CALL.size, np.int64)
        width = round_up(in_features, GROUP_SIZE)
        scratch = allocate_aligned((n_rows * (8 * width + 64),), np.uint8)
        y = allocate_aligned((n_rows, padded_out), np.float32)
        for field, value in {
            MATRIX.kind: KINDS[precision],
            MATRIX.weights: values.ctypes.data,
            MATRIX.scales: scales.ctypes.data,
            MATRIX.out_features: out_features,
            MATRIX.padded_out: padded_out,
            MATRIX.in_features: in_features,
        }.items():
            m[base + field] = value
        c[CALL.n_rows], c[CALL.max_rows], c[CALL.scratch_width] = n_rows, n_rows, width
        c[CALL.scratch] = scratch.ctypes.data
        x = np.random.default_rng(1).standard_normal(n_rows * in_features, dtype=np.float32)
        scratch[: x.nbytes] = x.view(np.uint8)
        arguments = m, c, y.ctypes.data, n_copies, values.nbytes // n_copies
        run(*arguments, 1)
        started_at = time.process_time()
        run(*arguments, 2)
        n_calls = max(1, int(2 * MIN_SECONDS / (time.process_time() - started_at)))
        started_at = time.process_time()
        run(*arguments, n_calls)
        seconds = (time.process_time() - started_at) / n_calls
        digest = hashlib.sha256(np.ascontiguousarray(y[:, :out_features]).tobytes()).hexdigest()
        return out_features * in_features * n_rows / seconds / 1e9, digest

    return measure


def make_engine_measurement(options: argparse.Namespace) -> Callable[[str, str], tuple[float, str]]:
    """Load a model in this tree and return a function that measures a task."""
    from tinystories.checkpoint import BUNDLED_MODEL, read_model
    from tinystories.engine.cpu.engine import CpuEngine
    from tinystories.engine.engine_config import EngineConfig

    settings = EngineConfig(engine="cpu", precision=options.precision, n_slots=32, threads=1)
    if options.preset == "bundled":
        engine = CpuEngine.load(read_model(BUNDLED_MODEL), settings)
    else:
        engine = CpuEngine(*make_random_weights(options), settings)
    ids = np.random.default_rng(0).integers(0, min(engine.config.vocab_size, 4000), 513).tolist()

    def measure(task: str, _: str) -> tuple[float, str]:
        n, results = 0, []
        if task == "prompt of 256":
            started_at = time.process_time()
            while not n or time.process_time() - started_at < 3 * MIN_SECONDS:
                results = [engine.prefill(0, ids[:256])]
                n += 256
        elif task.startswith("score"):
            started_at = time.process_time()
            results = engine.logprobs([ids[: engine.config.n_ctx]])
            n = len(results[0])
        else:
            n_streams = 1 if task == "one stream" else int(task.split()[0])
            slots = list(range(n_streams))
            tokens = [int(engine.prefill(slot, ids[slot : slot + 8]).argmax()) for slot in slots]
            n_steps = 200 // n_streams + 20
            started_at = time.process_time()
            for _ in range(n_steps):
                results = [engine.step(slots, tokens)]
                tokens = results[0].argmax(axis=1).tolist()
            n = n_steps * n_streams
        seconds = time.process_time() - started_at
        return n / seconds, hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()

    return measure


def make_random_weights(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the config of a preset and random weights in the precision of the options, the same in every tree."""
    import dataclasses

    from tinystories.config_file import load_config
    from tinystories.weights.load import quantized_encoding
    from tinystories.weights.names import expected_shapes
    from tinystories.weights.quantize import QUANTIZERS, allocate_aligned

    config = dataclasses.replace(load_config(options.preset).model, vocab_size=options.vocab)
    precision = weights_precision(options.precision)
    rng, weights = np.random.default_rng(0), {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            arrays = {name: np.full(shape, 0 if name.endswith("bias") else 1, dtype=np.float32)}
        else:
            weight = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)
            encoding = quantized_encoding(name, shape, config, precision)
            if precision == "fp32" or not encoding:
                arrays = {name: weight}
            else:
                values, scales = QUANTIZERS[encoding](weight)
                arrays = {f"{name}.{encoding}": values, f"{name}.scales": scales}
        for key, array in arrays.items():  # aligned to cache lines, as in a file
            weights[key] = allocate_aligned(array.shape, array.dtype)
            weights[key][...] = array
    return config, weights


if __name__ == "__main__":
    run_main(main)
