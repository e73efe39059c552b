"""A step whose results are on their way from the device."""

import torch
from torch import Tensor


class Pending:
    """Loss and gradient norm of a launched step; `read` waits for this step and for none that was launched after it.

    `Tensor.item` would wait for everything launched so far. So on CUDA the two are copied into pinned memory right
    behind the step, and an event tells when they are there.
    """

    def __init__(self, step: int, tokens: int, n_targets: int, rate: float, loss: Tensor, norm: Tensor) -> None:
        """`step` counts this one, `tokens` are the targets up to its end; `loss` and `norm` are scalars, not read."""
        self.step, self.tokens, self.n_targets, self.rate = step, tokens, n_targets, rate
        self.numbers = torch.stack((loss, norm))
        self.arrived: torch.cuda.Event | None = None
        if self.numbers.device.type == "cuda":
            stream = torch.cuda.current_stream(self.numbers.device)
            self.numbers = torch.empty(2, pin_memory=True).copy_(self.numbers, non_blocking=True)
            self.arrived = torch.cuda.Event(blocking=True)  # the waiting host sleeps: its core can make a batch
            self.arrived.record(stream)

    def read(self) -> tuple[float, float]:
        """Loss in nats per target and gradient norm, once the device has them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.numbers.tolist()
        return loss, norm
