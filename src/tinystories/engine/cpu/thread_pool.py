"""A thread pool whose threads call one function together and sleep between calls, and how many threads to use."""

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

# Limit of the default: threads meet at six barriers per layer, and the slowest sets the pace.
MAX_THREADS = 16


def count_physical_cores() -> int:
    """Return how many threads to use by default: the physical cores this process may use, at most `MAX_THREADS`.

    SMT siblings count as one core. The CPU quota of a container lowers the number.
    """
    return max(1, math.ceil(min(MAX_THREADS, count_available_cores(), cgroup_cpu_quota())))


def count_available_cores() -> int:
    """Return the number of physical cores in this process's CPU affinity, or an estimate where the system has none.

    macOS: performance cores only. Without affinity (Windows): half of the logical CPUs.
    """
    threads = os.cpu_count() or 1
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]  # performance cores
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
    """Return the CPU quota of the container (cgroup v2 or v1) in cores; inf if there is no limit."""
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if limit == "max" or int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


class ThreadPool:
    """`run(task)` calls task(thread, n_threads) on all threads at once; the caller's thread is number 0.

    Returns when the caller's share is done, so `task` must end at a barrier. The barrier counter (int64) is monotonic
    and owned by the pool, because a worker may still read it after `run` has returned. Hold `lock` while calling `run`.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.task: Callable[[int, int], None] = print  # placeholder until the first run
        self.lock = threading.Lock()
        self.counter = np.zeros(1, dtype=np.int64)
        self.start_locks = [_thread.allocate_lock() for _ in range(1, n_threads)]
        for thread, start_lock in enumerate(self.start_locks, 1):
            start_lock.acquire()
            threading.Thread(target=self.run_worker, args=(thread, start_lock), daemon=True).start()

    def run_worker(self, thread: int, start_lock: "_thread.LockType") -> None:
        while True:
            start_lock.acquire()
            self.task(thread, self.n_threads)

    def run(self, task: Callable[[int, int], None]) -> None:
        """Run `task` on all threads. It must not be a Python function, but may be a partial of a ctypes function.

        Otherwise a signal handler (Ctrl-C) could run and raise after some workers have started but before the caller
        has done its share, which would leave the workers waiting at the barrier forever.
        """
        self.task = task
        # Start the workers, then do share 0, all inside one C call (deque of map): Python only handles signals between
        # bytecodes.
        call: Any = operator.call
        actions = [*(start_lock.release for start_lock in self.start_locks), functools.partial(task, 0, self.n_threads)]
        collections.deque(map(call, actions), maxlen=0)


@functools.cache
def shared_pool(n_threads: int) -> ThreadPool:
    """Return the pool of this size that all engines of the process share; its `lock` serializes their calls."""
    return ThreadPool(n_threads)


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child process needs new pools
    os.register_at_fork(after_in_child=shared_pool.cache_clear)
