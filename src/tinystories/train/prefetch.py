"""The batch of the next step, made while the device works on this one."""

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
    """The rows of a step for one rank, on the host, and the targets of the whole step over all ranks.

    `ids` holds inputs and targets in one piece, so that one copy brings them to a device; int32 halves it.
    """

    ids: Int[Tensor, "2 B T"]
    n_targets: int

    @staticmethod
    def from_rows(rows: PackedRows, step: int, batch_size: int, world: World, pin_memory: bool = False) -> "Batch":
        """`pinned`: in memory that CUDA copies from while the host goes on. PyTorch keeps such memory for the next
        batch, and does not give it out again before the copy is done.
        """
        inputs, targets = rows.get_batch(step, batch_size, world.rank, world.size)
        ids = torch.empty((2, *inputs.shape), dtype=torch.int32, pin_memory=pin_memory)
        ids[0].copy_(torch.from_numpy(inputs))
        ids[1].copy_(torch.from_numpy(targets))
        return Batch(ids, rows.count_targets(step, batch_size))

    def to_device(self, device: torch.device) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Inputs and targets as int64 on a device, without waiting for the copy."""
        inputs, targets = self.ids.to(device, non_blocking=True).long()
        return inputs, targets


class Prefetch:
    """`take(step)` for the steps from `first` to before `stop`, in order; `make` runs in a thread, one step ahead.

    As a context manager: no thread is left behind it, however it is left. What `make` raises, `take` raises for the
    same step. Only the thread may call `make` meanwhile: it need not be safe for two at once.
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
        """Have the batch of `step` made."""
        self.future = self.pool.submit(self.make_batch, self.next_step) if self.next_step < self.stop_step else None

    def get(self, step: int) -> Batch:
        assert step == self.next_step, f"step {self.next_step} comes next, not {step}"
        assert self.future is not None, "inside `with`, and before `stop`"
        batch = self.future.result()
        self.next_step += 1
        self.submit_next()
        return batch
