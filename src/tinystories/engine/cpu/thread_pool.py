"""Threads that call one function together. They sleep between calls."""

import _thread
import collections
import functools
import math
import operator
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAX_THREADS = 16  # threads by default: they meet six times a layer, and the slowest sets the pace


def count_physical_cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs; at most `MOST`."""
    return max(1, math.ceil(min(MAX_THREADS, count_available_cores(), cgroup_cpu_quota())))


def count_available_cores() -> int:
    threads = os.cpu_count() or 1
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]  # the fast ones
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return int(output) if output.isdigit() else threads
    if not hasattr(os, "sched_getaffinity"):
        return math.ceil(threads / 2)
    allowed_cpus = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed_cpus:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed_cpus)
    return len(siblings)


def cgroup_cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that a container is given; without end where there is no limit."""
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if limit == "max" or int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


class ThreadPool:
    """`run(f)` calls f(thread, n_threads) in n threads at once, the caller's among them as number 0.

    It returns when the caller's own call has: f must end by waiting for the others. They wait by `counter` (int64),
    which only ever grows: it is the team's, since a thread may look at it when the caller is gone already. Who runs
    holds `busy`.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.task: Callable[[int, int], None] = print
        self.lock = threading.Lock()
        self.counter = np.zeros(1, dtype=np.int64)
        self.start_locks = [_thread.allocate_lock() for _ in range(1, n_threads)]
        for thread, start_lock in enumerate(self.start_locks, 1):
            start_lock.acquire()
            threading.Thread(target=self.run_worker, args=(thread, start_lock), daemon=True).start()

    @staticmethod
    def shared(n_threads: int) -> "ThreadPool":
        """One team of each size serves all engines of the process, one call at a time."""
        return shared_pool(n_threads)

    def run_worker(self, thread: int, start_lock: "_thread.LockType") -> None:
        while True:
            start_lock.acquire()
            self.task(thread, self.n_threads)

    def run(self, task: Callable[[int, int], None]) -> None:
        """`work` must be no Python function, so that no signal's handler can run between the first start and its end:
        threads that were started would wait for ever.
        """
        self.task = task
        call: Any = operator.call
        actions = [*(start_lock.release for start_lock in self.start_locks), functools.partial(task, 0, self.n_threads)]
        collections.deque(map(call, actions), maxlen=0)


@functools.cache
def shared_pool(n_threads: int) -> ThreadPool:
    return ThreadPool(n_threads)


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=shared_pool.cache_clear)
