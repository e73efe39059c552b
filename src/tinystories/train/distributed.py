"""Several processes that train one model: who they are, what they agree on, and which of them speaks.

`torchrun` starts the ranks and says by environment variables who each one is; without it there is one, and nothing
here costs anything. All ranks take the same steps on the same clock: whatever only one of them can know (a signal, what
a directory holds) is agreed on first. Rank 0 alone writes files and talks.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tinystories.errors import UserError

if TYPE_CHECKING:  # commands import this file, and --help need not wait for NumPy either
    import numpy as np
    import numpy.typing as npt
    import torch

TIMEOUT = datetime.timedelta(minutes=10)  # with a rank that says nothing; one that dies is noticed at once


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run and this one's place: `rank` of `size` over all machines, `local_rank` of `local_size`
    on this one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def from_environment() -> "World":
        """What torchrun has set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE. `UserError` where it cannot be."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        texts = [os.environ.get(name) for name in names]
        if texts[1] is None:
            return World()
        try:
            rank, size, local_rank, local_size = (int(text or "") for text in texts)
        except ValueError:
            rank, size, local_rank, local_size = -1, 0, -1, 0
        if not (0 <= local_rank < local_size <= size and local_rank <= rank < size):
            variables = " ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
            raise UserError(
                f"{variables} is no place in a group of processes; start them with torchrun, or unset these"
            )
        return World(rank, size, local_rank, local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def batch_size_per_rank(self, batch_size: int) -> int:
        """Rows of a step for each rank. `UserError` where they cannot be shared out evenly."""
        if batch_size % self.size:
            raise UserError(
                f"train.batch_size={batch_size} cannot be shared by {self.size} processes;"
                f" make it a multiple of {self.size}, or start another number of them"
            )
        return batch_size // self.size

    def all_reduce_max(self, value: int) -> int:
        """The largest of what the ranks give."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        tensor = torch.tensor(value)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: int) -> int:
        """What rank 0 gives."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        tensor = torch.tensor(value)
        distributed.broadcast(tensor, 0)
        return int(tensor)

    def all_reduce_sum(self, values: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
        """The sum over all ranks of arrays of one shape."""
        if self.size == 1:
            return values
        import torch
        from torch import distributed

        total = torch.from_numpy(values)
        distributed.all_reduce(total)
        return total.numpy()

    def all_reduce_(self, value: "torch.Tensor") -> None:
        """Sum a tensor over all ranks in place, on its device, without waiting for it."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(value)

    def resolve_device(self, name: str) -> str:
        """The device of this rank where `name` leaves it open which one of a machine's GPUs."""
        import torch

        if self.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_size > torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} processes on a machine with {torch.cuda.device_count()} CUDA devices; start"
                f" torchrun with --nproc-per-node {torch.cuda.device_count()}, or train with --train.device cpu"
            )
        return f"cuda:{self.local_rank}"


SINGLE = World()


@contextlib.contextmanager
def process_group(world: World, device: "torch.device") -> Iterator[None]:
    """While it lasts, the ranks can talk: by NCCL between GPUs, by gloo between CPUs and for what is not on a GPU.

    A rank that is lost makes the others raise `Lost`.
    """
    if world.size == 1:
        yield
        return
    import torch
    from torch import distributed

    logging.getLogger().setLevel(logging.INFO if world.is_main else logging.ERROR)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT, rank=world.rank, world_size=world.size)
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise PeerLost from error
        raise
    distributed.destroy_process_group()


class PeerLost(Exception):
    """Another rank has ended, or cannot be reached."""


def wrap_ddp(module: "torch.nn.Module", world: World, device: "torch.device") -> Any:
    """The module, with gradients averaged over the ranks as its backward pass goes (DistributedDataParallel)."""
    if world.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option has another name from torch 2.13 on
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def claim_error_message(text: str) -> bool:
    """Whether no other rank has said the same: what stops all of them is told once."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"said/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # nobody keeps a list: better twice than never
        return True
