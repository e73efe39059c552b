"""Prefetching: a thread builds the batch of the next step while the device computes the current one."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from jaxtyping import Int
from torch import Tensor

from tinystories.data.loader import PackedRows
from tinystories.train.distributed import World


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's rows of a step, in host memory, and the number of targets of the whole step over all ranks.

    `ids` holds inputs and targets in one tensor, so that a single copy moves both to the device; int32 halves its size.
    """

    ids: Int[Tensor, "2 B T"]
    n_targets: int

    @staticmethod
    def from_rows(rows: PackedRows, step: int, batch_size: int, world: World, pin_memory: bool = False) -> "Batch":
        """Build the batch of `step` for the rank of `world`.

        `pin_memory` allocates page-locked memory, from which CUDA copies asynchronously. PyTorch's allocator reuses it
        for later batches, and only after the copy is done.
        """
        inputs, targets = rows.get_batch(step, batch_size, world.rank, world.size)
        ids = torch.empty((2, *inputs.shape), dtype=torch.int32, pin_memory=pin_memory)
        ids[0].copy_(torch.from_numpy(inputs))
        ids[1].copy_(torch.from_numpy(targets))
        return Batch(ids, rows.count_targets(step, batch_size))

    def to_device(self, device: torch.device) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Return inputs and targets as int64 on `device`, without waiting for the copy."""
        inputs, targets = self.ids.to(device, non_blocking=True).long()
        return inputs, targets


class Prefetch:
    """Calls `make_batch` in a thread, one step ahead of `get(step)`, for steps first_step .. stop_step - 1 in order.

    Use it as a context manager; the thread has ended when the block is left, even by an exception. An exception in
    `make_batch` is raised by the `get` of that step. Nothing else may call `make_batch` inside the block, so it need
    not be thread-safe.
    """

    def __init__(self, make_batch: Callable[[int], Batch], first_step: int, stop_step: int) -> None:
        self.make_batch, self.next_step, self.stop_step = make_batch, first_step, stop_step
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self.future: Future[Batch] | None = None

    def __enter__(self) -> "Prefetch":
        self.submit_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=True)

    def submit_next(self) -> None:
        """Start building the batch of `next_step`, if there is one."""
        self.future = self.pool.submit(self.make_batch, self.next_step) if self.next_step < self.stop_step else None

    def get(self, step: int) -> Batch:
        """Return the batch of `step`, which must be the next one, and start building the one after it."""
        assert step == self.next_step, f"step {self.next_step} comes next, not {step}"
        assert self.future is not None, "only inside `with`, and only before stop_step"
        batch = self.future.result()
        self.next_step += 1
        self.submit_next()
        return batch
