"""Beside other programs: no call waits for a thread that does not run, and small models use one thread by default."""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tinystories
from tinystories.config import ModelConfig
from tinystories.engine.cpu import runtime, thread_pool
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.cpu.kernels.layout import CLOSED, EPOCH_SHIFT, PHASE_SHIFT, WORK_QUEUE
from tinystories.engine.cpu.thread_pool import ThreadPool, cgroup_cpu_quota
from tinystories.engine.native_step import NativeStep
from tinystories.model import GPT

IDS = list(range(100, 190))


class SleepingPool(ThreadPool):
    """A pool whose workers never get a core."""

    def add_worker(self) -> None:
        start_lock = threading.Lock()
        start_lock.acquire()
        self.start_locks.append(start_lock)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ThreadPool:
    pool = SleepingPool()
    monkeypatch.setattr(runtime, "shared_pool", lambda: pool)
    return pool


@pytest.fixture
def thread_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of threads of each call, on a machine with 4 cores."""
    counts: list[int] = []
    run = ThreadPool.run

    def record(self: ThreadPool, task: Any, n_threads: int) -> None:
        counts.append(n_threads)
        run(self, task, n_threads)

    monkeypatch.setattr(ThreadPool, "run", record)
    monkeypatch.setattr("tinystories.engine.cpu.engine.count_physical_cores", lambda: 4)
    return counts


def bundled(threads: int | None) -> CpuEngine:
    engine = tinystories.load(engine="cpu", threads=threads, n_slots=8).engine
    assert isinstance(engine, CpuEngine)
    return engine


def logits(engine: CpuEngine) -> np.ndarray:
    return np.stack([engine.prefill(0, IDS), engine.step([0], [7])[0]])


def test_the_default_continues_a_story_of_the_bundled_model_on_one_thread(thread_counts: list[int]) -> None:
    """As reported: two threads that wait for each other were up to 90 times slower than one beside a busy process."""
    engine = bundled(threads=None)
    engine.prefill(0, [1])
    engine.step([0], [7])
    assert thread_counts == [1, 1]


def test_prompts_and_batches_use_all_cores(thread_counts: list[int]) -> None:
    engine = bundled(threads=None)
    for slot in range(8):
        engine.prefill(slot, IDS[:64])
    engine.step(list(range(8)), [7] * 8)
    assert thread_counts == [4] * 9


def test_a_number_of_threads_that_is_given_is_used(thread_counts: list[int]) -> None:
    engine = bundled(threads=3)
    engine.prefill(0, [1])
    engine.step([0], [7])
    assert thread_counts == [3, 3]


@pytest.mark.parametrize(("n_bytes", "expected"), [(19_000_000, 1), (21_000_000, 4)])
def test_weights_decide_the_threads_of_a_step(thread_counts: list[int], n_bytes: int, expected: int) -> None:
    engine = bundled(threads=None)
    engine.runtime.weight_table.n_bytes = n_bytes
    engine.prefill(0, [1])
    assert thread_counts == [expected]


def test_steps_of_a_small_torch_model_use_one_thread(
    thread_counts: list[int], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = GPT(tiny()).eval()
    step = NativeStep(model)
    config: ModelConfig = model.config
    cache = np.zeros((2, config.n_layer, 1, config.kv_heads, config.n_ctx, config.head_dim), np.float32)
    address = runtime.KVCacheAddress(cache[0].ctypes.data, cache[1].ctypes.data, 1)
    step.runtime.run(np.array([3]), np.array([0]), np.array([0]), address)
    assert thread_counts == [1]


def test_a_call_completes_without_the_threads_that_do_not_run(pool: ThreadPool) -> None:
    """Bit for bit, and without waiting for anybody."""
    expected = logits(bundled(threads=1))
    assert (logits(bundled(threads=3)) == expected).all()
    assert len(pool.start_locks) == 2


def test_a_thread_that_comes_after_the_call_changes_nothing(pool: ThreadPool) -> None:
    engine = bundled(threads=2)
    expected = logits(engine)
    workspace = engine.runtime.workspace
    late_task, _ = pool.job
    engine.step([0], [9])
    before = [array.copy() for array in workspace._keepalive]
    late_task(1)
    for array, copy in zip(workspace._keepalive, before, strict=True):
        assert array.tobytes() == copy.tobytes()
    assert (logits(engine) == expected).all()


def test_a_late_thread_does_not_read_tables_that_may_be_gone(pool: ThreadPool) -> None:
    """It may come when the engine of its call has been freed: here its tables are at address 0."""
    engine = bundled(threads=2)
    engine.prefill(0, IDS)
    queue = pool.queue
    assert queue[WORK_QUEUE.state] >> PHASE_SHIFT & CLOSED == CLOSED
    for state in (queue[WORK_QUEUE.state], (pool.epoch + 1) << EPOCH_SHIFT):  # after the call, and during the next one
        queue[WORK_QUEUE.state] = state
        engine.runtime.forward(0, 0, 1e-5, queue.ctypes.data, pool.epoch, 4, 1)  # would crash
        assert (queue[WORK_QUEUE.state], queue[WORK_QUEUE.n_done]) == (state, 0)


def test_a_late_thread_does_not_join_a_call_with_fewer_threads() -> None:
    """Its scratch memory does not exist in that call."""
    pool = ThreadPool()
    calls: list[int] = []

    def task(_queue: int, _epoch: int, _n_pieces: int, thread: int) -> None:
        calls.append(thread)

    pool.add_worker()
    pool.add_worker()
    with pool.lock:
        pool.run(task, 2)
    for _ in range(2):  # starts of earlier calls, seen only now
        pool.start_locks[1].release()
        while not pool.start_locks[1].locked():
            pass
    assert 2 not in calls


def test_a_piece_that_another_thread_holds_is_waited_for(pool: ThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has lost its core in the middle of a piece: the call completes when it is back, not before."""
    engine = bundled(threads=1)
    expected = logits(engine)
    engine.prefill(0, IDS)

    def run_with_a_lost_thread(task: Any, n_threads: int) -> None:
        assert n_threads == 1
        pool.epoch += 1
        opened = pool.epoch << EPOCH_SHIFT
        pool.queue[WORK_QUEUE.state] = opened + 1  # another thread has taken the first of two pieces
        caller = threading.Thread(target=task, args=(pool.queue.ctypes.data, pool.epoch, 2, 0))
        caller.start()
        while pool.queue[WORK_QUEUE.n_done] != 1:
            pass
        caller.join(0.05)
        assert caller.is_alive()
        pool.queue[WORK_QUEUE.state] = opened  # now somebody computes it
        caller.join()

    monkeypatch.setattr(pool, "run", run_with_a_lost_thread)
    assert (engine.step([0], [7])[0] == expected[1]).all()


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        # v2: the group of a systemd service has the quota, not the root (reported)
        ("0::/system.slice/a.service\n", {"system.slice/a.service/cpu.max": "200000 100000"}, 2),
        # the group above it is stricter
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000", "a/cpu.max": "100000 100000"}, 1),
        # the group has no limit of its own
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        # v1
        (
            "3:cpuset:/x\n2:cpu,cpuacct:/docker/1\n1:name=systemd:/y\n",
            {"cpu/docker/1/cpu.cfs_quota_us": "250000", "cpu/docker/1/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        # v1: a quota of a group of another controller is not this process's
        ("3:memory:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, math.inf),
        # a path that the container cannot see
        ("0::/../../outside\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a:b\n", {"a:b/cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "100000 0"}, math.inf),
    ],
)
def test_the_quota_of_the_processs_own_group_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert cgroup_cpu_quota(tmp_path / "root", tmp_path / "membership") == expected


def test_the_default_number_of_threads_is_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_pool, "count_available_cores", lambda: 8)
    monkeypatch.setattr(thread_pool, "cgroup_cpu_quota", lambda: 2.5)
    assert thread_pool.count_physical_cores() == 3
