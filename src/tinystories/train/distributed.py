"""Data-parallel training in several processes: ranks, process group, collectives and DistributedDataParallel.

`torchrun` starts the ranks and identifies each one by environment variables. Without it there is a single process and
everything here is a no-op. All ranks run the same steps: whatever only one rank can know (a signal, the contents of a
directory) is first shared by a collective. Only rank 0 writes files and logs.
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

if TYPE_CHECKING:  # the CLI imports this module, and --help should not wait for NumPy or torch
    import numpy as np
    import numpy.typing as npt
    import torch

# How long a collective waits for an unresponsive rank. A rank that dies is noticed immediately.
TIMEOUT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks of a run: this process is `rank` of `size` in all and `local_rank` of `local_size` on its machine.

    The collectives (`all_reduce_max`, `broadcast`, ...) must be called by all ranks, inside `process_group`. With a
    single process they do nothing and return their argument.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def from_environment() -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun sets. `UserError` if inconsistent.

        With a WORLD_SIZE of 1 the others are not read: launchers of a single process set only some of them.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        texts = [os.environ.get(name) for name in names]
        if texts[1] is None or texts[1].strip() == "1":
            return World()
        try:
            rank, size, local_rank, local_size = (int(text or "") for text in texts)
        except ValueError:
            rank, size, local_rank, local_size = -1, 0, -1, 0
        if not (0 <= local_rank < local_size <= size and local_rank <= rank < size):
            variables = " ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
            raise UserError(f"inconsistent torchrun variables: {variables}; launch with torchrun, or unset them")
        return World(rank, size, local_rank, local_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def batch_size_per_rank(self, batch_size: int) -> int:
        """Return the number of rows of a step for each rank. `UserError` if `batch_size` is not divisible by `size`."""
        if batch_size % self.size:
            raise UserError(
                f"train.batch_size={batch_size} is not divisible by the number of processes, {self.size};"
                f" make it a multiple of {self.size}, or start a different number of processes"
            )
        return batch_size // self.size

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value passed by any rank."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        tensor = torch.tensor(value)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, value: int) -> int:
        """Return the value passed by rank 0."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        tensor = torch.tensor(value)
        distributed.broadcast(tensor, 0)
        return int(tensor)

    def all_reduce_sum(self, values: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
        """Return the elementwise sum over all ranks of arrays of equal shape; may overwrite `values`."""
        if self.size == 1:
            return values
        import torch
        from torch import distributed

        total = torch.from_numpy(values)
        distributed.all_reduce(total)
        return total.numpy()

    def all_reduce_(self, value: "torch.Tensor") -> None:
        """Sum a tensor over all ranks in place, on its device, without making the host wait for a GPU."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(value)

    def resolve_device(self, name: str) -> str:
        """Return this rank's own GPU ("cuda:N") if `name` is "auto" or "cuda" and there are several ranks, else `name`.

        `UserError` if the machine has fewer GPUs than ranks.
        """
        import torch

        if self.size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_size > torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} processes but only {torch.cuda.device_count()} CUDA devices on this machine; start"
                f" torchrun with --nproc-per-node {torch.cuda.device_count()}, or train with --train.device cpu"
            )
        return f"cuda:{self.local_rank}"


SINGLE = World()


@contextlib.contextmanager
def process_group(world: World, device: "torch.device") -> Iterator[None]:
    """Connect the ranks inside the block: NCCL for tensors on GPUs, gloo for tensors on CPUs.

    Raises `PeerLost` if another rank ends or cannot be reached. Lowers the log level of all ranks except rank 0.
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
    """Another rank has ended or cannot be reached."""


def wrap_ddp(module: "torch.nn.Module", world: World, device: "torch.device") -> Any:
    """Wrap the module in DistributedDataParallel: gradients are averaged over the ranks during the backward pass."""
    if world.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    device_ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames one of the options
        return DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def claim_error_message(text: str) -> bool:
    """Return True for the first rank that calls this with `text`, so that an error of all ranks is printed once.

    Uses the key-value store of torchrun; returns True if that cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() == "1":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"said/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # no store: better to print it twice than never
        return True
