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

MOST = 16  # threads by default: they meet six times a layer, and the slowest sets the pace


def physical_cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs; at most `MOST`."""
    return max(1, math.ceil(min(MOST, cores_of_the_machine(), quota())))


def cores_of_the_machine() -> int:
    threads = os.cpu_count() or 1
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]  # the fast ones
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return int(told) if told.isdigit() else threads
    if not hasattr(os, "sched_getaffinity"):
        return math.ceil(threads / 2)
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return len(siblings)


def quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that a container is given; without end where there is no limit."""
    try:
        if (root / "cpu.max").exists():
            given, period = (root / "cpu.max").read_text().split()
        else:
            given, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if given == "max" or int(given) <= 0 else int(given) / int(period)
    except (OSError, ValueError):
        return math.inf


class Team:
    """`run(f)` calls f(thread, n_threads) in n threads at once, the caller's among them as number 0.

    It returns when the caller's own call has: f must end by waiting for the others. They wait by `counter` (int64),
    which only ever grows: it is the team's, since a thread may look at it when the caller is gone already. Who runs
    holds `busy`.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.work: Callable[[int, int], None] = print
        self.busy = threading.Lock()
        self.counter = np.zeros(1, dtype=np.int64)
        self.starts = [_thread.allocate_lock() for _ in range(1, n_threads)]
        for number, start in enumerate(self.starts, 1):
            start.acquire()
            threading.Thread(target=self.serve, args=(number, start), daemon=True).start()

    @staticmethod
    def of(n_threads: int) -> "Team":
        """One team of each size serves all engines of the process, one call at a time."""
        return team_of(n_threads)

    def serve(self, number: int, start: "_thread.LockType") -> None:
        while True:
            start.acquire()
            self.work(number, self.n_threads)

    def run(self, work: Callable[[int, int], None]) -> None:
        """`work` must be no Python function, so that no signal's handler can run between the first start and its end:
        threads that were started would wait for ever.
        """
        self.work = work
        call: Any = operator.call
        actions = [*(start.release for start in self.starts), functools.partial(work, 0, self.n_threads)]
        collections.deque(map(call, actions), maxlen=0)


@functools.cache
def team_of(n_threads: int) -> Team:
    return Team(n_threads)


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=team_of.cache_clear)
