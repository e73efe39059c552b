"""Prefetching: a thread builds the batch of the next step while the device computes the current one."""

import dataclasses
import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

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

    step: int
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
        return Batch(step, ids, rows.count_targets(step, batch_size))

    def to_device(self, device: torch.device) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Return inputs and targets as int64 on `device`, without waiting for the copy."""
        inputs, targets = self.ids.to(device, non_blocking=True).long()
        return inputs, targets


def prefetch(make_batch: Callable[[int], Batch], first_step: int, stop_step: int) -> Generator[Batch]:
    """Yield the batches of steps first_step .. stop_step - 1; a thread builds each one while the last is in use.

    The thread ends when the generator is exhausted or closed. An exception in `make_batch` is raised in place of that
    batch. Nothing else may call `make_batch` until then, so it need not be thread-safe.
    """
    steps = iter(range(first_step, stop_step))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending = [pool.submit(make_batch, step) for step in itertools.islice(steps, 1)]
        while pending:
            batch = pending.pop().result()
            pending += [pool.submit(make_batch, step) for step in itertools.islice(steps, 1)]
            yield batch
