"""A step whose results are on their way from the device."""

import torch
from torch import Tensor


class InFlightStep:
    """Loss and gradient norm of a launched step; `read` waits for this step and for none that was launched after it.

    `Tensor.item` would wait for everything launched so far. So on CUDA the two are copied into pinned memory right
    behind the step, and an event tells when they are there.
    """

    def __init__(
        self, step: int, tokens: int, n_targets: int, learning_rate: float, loss: Tensor, grad_norm: Tensor
    ) -> None:
        """`step` counts this one, `tokens` are the targets up to its end; `loss` and `norm` are scalars, not read."""
        self.step, self.tokens, self.n_targets, self.learning_rate = step, tokens, n_targets, learning_rate
        self.scalars = torch.stack((loss, grad_norm))
        self.ready_event: torch.cuda.Event | None = None
        if self.scalars.device.type == "cuda":
            stream = torch.cuda.current_stream(self.scalars.device)
            self.scalars = torch.empty(2, pin_memory=True).copy_(self.scalars, non_blocking=True)
            self.ready_event = torch.cuda.Event(blocking=True)  # the waiting host sleeps: its core can make a batch
            self.ready_event.record(stream)

    def read(self) -> tuple[float, float]:
        """Loss in nats per target and gradient norm, once the device has them."""
        if self.ready_event is not None:
            self.ready_event.synchronize()
        loss, grad_norm = self.scalars.tolist()
        return loss, grad_norm
