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

from tinystories.engine.cpu.kernels.layout import EPOCH_SHIFT, MAX_EPOCHS, WORK_QUEUE
from tinystories.weights.quantize import allocate_aligned

# Limit of the default: threads wait for each other six times per layer, and the slowest sets the pace.
MAX_THREADS = 16
# Pieces of a phase for each thread: with more than one, a thread that has lost its core leaves less to the others.
PIECES_PER_THREAD = 2
Task = Callable[[int, int, int, int], None]


def count_physical_cores() -> int:
    """Return how many threads to use by default: the physical cores this process may use, at most `MAX_THREADS`.

    SMT siblings count as one core. The CPU quota of a container lowers the number.
    """
    return max(1, math.ceil(min(MAX_THREADS, count_available_cores(), cgroup_cpu_quota())))


def describe_threads() -> str:
    """Return how many threads are used by default and what limits them, for people."""
    limits = {
        "physical cores": count_available_cores(),
        "the CPU quota of the container": cgroup_cpu_quota(),
        "the largest default": MAX_THREADS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return f"{count_physical_cores()} (limited by {limit}); 1 where there is little work"


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


def cgroup_cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership_file: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU quota of this process in cores; inf if there is no limit.

    The smallest quota counts of the process's own control group and all above it (cgroup v2 or v1).
    """
    folders = {root, root / "cpu"}
    try:
        memberships = membership_file.read_text().splitlines()
    except OSError:
        memberships = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue  # v1: a hierarchy without the CPU controller
        mount = root / "cpu" if controllers else root
        # A container may see the path that the group has outside. Parts that do not exist here are skipped.
        group = [part for part in path.split("/") if part not in ("", "..")]
        folders |= {mount.joinpath(*group[:depth]) for depth in range(len(group) + 1)}
    return min(map(read_cpu_quota, folders))


def read_cpu_quota(folder: Path) -> float:
    """Return the CPU quota of a control group (v2 or v1) in cores; inf if it has none."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if limit == "max" or int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


class ThreadPool:
    """Threads that compute the pieces of a work queue together and sleep between calls.

    `run` returns when the call is complete. Workers that come late find the queue closed, or that its epoch has
    changed, and do nothing: the queue belongs to the pool because they may still read it then. Hold `lock` while
    calling `run`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.queue = allocate_aligned((WORK_QUEUE.size,), np.int64)
        self.queue[:] = 0
        self.epoch = 0
        self.job: tuple[Callable[[int], None], int] = (print, 0)  # what threads do, and how many may
        self.start_locks: list[_thread.LockType] = []

    def add_worker(self) -> None:
        start_lock = _thread.allocate_lock()
        start_lock.acquire()
        self.start_locks.append(start_lock)
        threading.Thread(target=self.run_worker, args=(len(self.start_locks), start_lock), daemon=True).start()

    def run_worker(self, thread: int, start_lock: "_thread.LockType") -> None:
        while True:
            start_lock.acquire()
            task, n_threads = self.job
            if thread < n_threads:  # otherwise it comes late: this job is a later one, with fewer threads
                task(thread)

    def run(self, task: Task, n_threads: int) -> None:
        """Call task(address of the queue, epoch, number of pieces, thread) on n_threads threads; the caller's is 0.

        `task` must not be a Python function, but may be a partial of a ctypes function. Otherwise a signal handler
        (Ctrl-C) could run and raise while workers still compute, and the next call would overwrite their tables.
        """
        while len(self.start_locks) < n_threads - 1:
            self.add_worker()
        self.epoch = (self.epoch + 1) % MAX_EPOCHS
        n_pieces = PIECES_PER_THREAD * n_threads if n_threads > 1 else 1
        share = functools.partial(task, self.queue.ctypes.data, self.epoch, n_pieces)
        self.job = share, n_threads
        # Open the queue, wake the workers, then do the caller's share, all inside one C call (deque of map): Python
        # only handles signals between bytecodes. A worker whose lock is open has not yet seen an earlier start.
        open_queue = functools.partial(operator.setitem, self.queue, WORK_QUEUE.state, self.epoch << EPOCH_SHIFT)
        wake_ups = [lock.release for lock in self.start_locks[: n_threads - 1] if lock.locked()]
        call: Any = operator.call
        collections.deque(map(call, [open_queue, *wake_ups, functools.partial(share, 0)]), maxlen=0)


@functools.cache
def shared_pool() -> ThreadPool:
    """Return the pool that all engines of the process share; its `lock` serializes their calls."""
    return ThreadPool()


def renew_pool() -> None:
    """Replace the pool of the process, as a forked process must: threads do not survive a fork."""
    shared_pool.cache_clear()
    shared_pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_pool)
