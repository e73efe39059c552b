"""How fast the inner loops of one row of x read weights from memory, beside a loop that only reads.

Matrices have 512 columns, as most of modern-89m. Every loop reads its own part of the memory in turns with the others,
on as many threads as `--threads`; a turn counts only if all threads kept their cores and ran at the same time, so other
programs on the machine cost turns but do not change the numbers. Prints medians in GB/s of all threads together and the
medians of the ratios to the first loop of the same round, then one JSON line.

    python benchmarks/bandwidth.py
    python benchmarks/bandwidth.py --threads 1 --rounds 400

`file`: the memory is a mapped file; `small`: pages of 4 kB; `large`: pages of 2 MB (`weights.safetensors_file`).
"""

import argparse
import ctypes
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from script import run_main

from tinystories.engine.cpu.kernels.memory import njit, view_i64
from tinystories.engine.cpu.kernels.simd import atomic_increment, atomic_load, make_fp32_kernel, yield_core
from tinystories.engine.cpu.kernels.simd_int4 import BLOCK_BYTES, SCALE_BYTES, make_int4_kernel
from tinystories.engine.cpu.kernels.simd_int8 import make_int8_row_kernel
from tinystories.weights.quantize import GROUP_SIZE, INT8_BLOCK_ROWS, allocate_aligned

COLUMNS = 512
N_GROUPS = COLUMNS // GROUP_SIZE
MEMORY_BYTES = 320 << 20
MAX_SLOWDOWN, MIN_OVERLAP = 1.05, 0.7  # of a turn that counts: seconds over processor time; share of the others' time
# Inputs and outputs of all loops; their values do not matter.
ONES, OUTPUTS = (allocate_aligned((n,), np.float32) for n in (1 << 20, 1 << 23))
ONES[:] = 1
X, Y = ONES.ctypes.data, OUTPUTS.ctypes.data


class Turn(NamedTuple):
    """What a thread measured: seconds of the clock, and of the processor."""

    start: float
    end: float
    cpu_seconds: float


def make_turn(loop: Any) -> Callable[[int, int, int, int, int], None]:
    """Compile a function of (address, bytes, address of a counter, n, address of 8 integers) for a loop.

    It counts its thread, waits until n have been counted, and runs the loop. The integers become seconds and
    nanoseconds of the clock before it, of the processor time before and after it, and of the clock after it.
    """
    read_clock = ctypes.CDLL(None).clock_gettime
    read_clock.argtypes, read_clock.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int
    clock, processor = time.CLOCK_MONOTONIC, time.CLOCK_THREAD_CPUTIME_ID

    @numba.cfunc(types.void(*[types.int64] * 5))
    def turn(address, n_bytes, counter, n, times):  # type: ignore[no-untyped-def]
        atomic_increment(counter)
        spins = 0
        while atomic_load(counter) < n:
            spins += 1
            if spins > 20000:
                yield_core()
        read_clock(processor, times + 16)
        read_clock(clock, times)
        loop(address, n_bytes)
        read_clock(clock, times + 48)
        read_clock(processor, times + 32)

    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(turn.address)


def make_loops() -> dict[str, Callable[[int, int, int, int, int], None]]:
    """Compile the loops, functions of (address, bytes), with `make_turn`."""
    fp32_1x1, fp32_4x1, int8_row = make_fp32_kernel(1, 1), make_fp32_kernel(4, 1), make_int8_row_kernel(16)
    int4_kernels = {"int4": make_int4_kernel(1, 1), "int4, prefetched": make_int4_kernel(1, 1, from_memory=True)}
    row, block = 4 * COLUMNS, INT8_BLOCK_ROWS * COLUMNS

    @njit
    def read(address, n_bytes):  # type: ignore[no-untyped-def]
        words, total = view_i64(address, n_bytes // 8), 0
        for i in range(n_bytes // 8):
            total += words[i]
        view_i64(Y, 1)[0] = total

    @njit
    def fp32_four_rows(address, n_bytes):  # type: ignore[no-untyped-def]
        for i in range(0, n_bytes // row, 4):
            fp32_4x1(address + i * row, row, X, row, COLUMNS // 8, Y + 4 * i, 0, 0)

    @njit
    def fp32_one_row(address, n_bytes):  # type: ignore[no-untyped-def]
        for i in range(n_bytes // row):
            fp32_1x1(address + i * row, row, X, row, COLUMNS // 8, Y + 4 * i, 0, 0)

    @njit
    def int8(address, n_bytes):  # type: ignore[no-untyped-def]
        int8_row(n_bytes // block, address, block, COLUMNS // 4, X, 2 * COLUMNS, Y, 0, X, X)

    def make_int4(kernel: Any) -> Any:
        @njit
        def int4(address, n_bytes):  # type: ignore[no-untyped-def]
            n_blocks = n_bytes // ((BLOCK_BYTES + SCALE_BYTES) * N_GROUPS)
            scales = address + n_blocks * BLOCK_BYTES * N_GROUPS
            for i in range(n_blocks):
                w, w_scales = address + i * BLOCK_BYTES * N_GROUPS, scales + i * SCALE_BYTES * N_GROUPS
                kernel(w, N_GROUPS, X, COLUMNS, Y + 32 * i, 0, w_scales, X, X, 4 * N_GROUPS, 1)

        return int4

    loops = {"read": read, "fp32, 4 rows": fp32_four_rows, "fp32, 1 row": fp32_one_row, "int8": int8}
    loops |= {name: make_int4(kernel) for name, kernel in int4_kernels.items()}
    return {name: make_turn(loop) for name, loop in loops.items()}


def allocate_memory() -> dict[str, Any]:
    """Return the same bytes in memory of each kind."""
    words = np.random.default_rng(0).integers(0, 1 << 30, MEMORY_BYTES // 8)
    memory = {}
    with tempfile.TemporaryFile() as file:
        words.tofile(file)
        file.flush()
        memory["file"] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.int64)
    for name, advice in (("small", mmap.MADV_NOHUGEPAGE), ("large", mmap.MADV_HUGEPAGE)):
        pages = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(advice)
        memory[name] = np.frombuffer(pages, np.int64)
        memory[name][:] = words
    return memory


class Threads:
    """Threads that run a loop at the same time."""

    def __init__(self, n_threads: int) -> None:
        self.counter, self.n_passed = np.zeros(1, np.int64), 0
        self.times = np.zeros((n_threads, 64), np.int64)
        self.barrier = threading.Barrier(n_threads + 1)
        self.job: tuple[Any, list[int], int] = (print, [], 0)
        for i in range(n_threads):
            threading.Thread(target=self.work, args=(i,), daemon=True).start()

    def work(self, i: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[i % len(cores)]})  # of this thread: woken together, they may share a core
        while True:
            self.barrier.wait()
            loop, addresses, n_bytes = self.job
            loop(addresses[i], n_bytes, self.counter.ctypes.data, self.n_passed, self.times[i].ctypes.data)
            self.barrier.wait()

    def run(self, loop: Any, addresses: list[int], n_bytes: int) -> list[Turn]:
        """Run a loop over n_bytes from each address on."""
        self.job = loop, addresses, n_bytes
        self.n_passed += len(addresses)
        self.barrier.wait()
        self.barrier.wait()
        seconds = self.times[:, 0:8:2] + self.times[:, 1:8:2] / 1e9
        return [Turn(start, end, after - before) for start, before, after, end in seconds.tolist()]


def counts(turns: list[Turn]) -> bool:
    """Return whether all threads kept their cores and ran at the same time."""
    overlap = min(turn.end for turn in turns) - max(turn.start for turn in turns)
    seconds = [turn.end - turn.start for turn in turns]
    kept = all(s <= MAX_SLOWDOWN * turn.cpu_seconds + 2e-6 for s, turn in zip(seconds, turns, strict=True))
    return kept and overlap >= MIN_OVERLAP * max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--mb", type=int, default=2, help="megabytes that a thread reads in a turn")
    options = parser.parse_args()
    loops, memory, threads = make_loops(), allocate_memory(), Threads(options.threads)
    n_bytes = options.mb << 20
    n_parts = MEMORY_BYTES // n_bytes
    cases = [(loop, kind) for loop in loops for kind in memory]
    rates: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    ratios: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for number in range(options.rounds):
        first = None
        for index, (name, kind) in enumerate(cases):
            loop, address = loops[name], memory[kind].ctypes.data
            part = number * options.threads + index * n_parts // len(cases)
            addresses = [address + (part + i) % n_parts * n_bytes for i in range(options.threads)]
            turns = threads.run(loop, addresses, n_bytes)
            if not counts(turns):
                continue
            rate = sum(n_bytes / (turn.end - turn.start) for turn in turns) / 1e9
            rates[name, kind].append(rate)
            first = rate if index == 0 else first
            if first:
                ratios[name, kind].append(rate / first)
    table = []
    for name, kind in cases:
        if not ratios[name, kind]:
            print(f"{name:18} {kind:6} no turn counted")
            continue
        row = {"loop": name, "pages": kind, "turns": len(rates[name, kind])}
        row |= {"gb_per_s": round(statistics.median(rates[name, kind]), 1)}
        row |= {"ratio": round(statistics.median(ratios[name, kind]), 2)}
        print(f"{name:18} {kind:6} {row['gb_per_s']:6.1f} GB/s   ratio {row['ratio']:.2f}   {row['turns']} turns")
        table.append(row)
    print(json.dumps({"benchmark": "bandwidth", "threads": options.threads, "rows": table}))


if __name__ == "__main__":
    run_main(main)
