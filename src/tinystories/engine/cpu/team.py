"""Threads that call one function together. They sleep between calls."""

import _thread
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path


def physical_cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            return len(allowed)
    return len(siblings)


class Team:
    """`run(f)` calls f(thread) in n threads at once, the caller's among them as number 0.

    It returns when the caller's own call has: f must end by waiting for the others.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.work: Callable[[int], None] = print
        self.busy = threading.Lock()
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
            self.work(number)

    def run(self, work: Callable[[int], None]) -> None:
        with self.busy:
            self.work = work
            for start in self.starts:
                start.release()
            work(0)


@functools.cache
def team_of(n_threads: int) -> Team:
    return Team(n_threads)


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=team_of.cache_clear)
