"""A training step that has been launched on the device but whose results have not been read yet."""

import torch

from tinystories.train.step import StepResult


class InFlightStep:
    """Loss and gradient norm of a launched step; `read` waits for this step but not for any launched after it.

    `Tensor.item` would wait for everything in the stream. So on CUDA both values are copied into pinned memory right
    after the step, and an event marks the end of the copy.
    """

    def __init__(self, step: int, tokens: int, result: StepResult) -> None:
        """`step` and `tokens` (targets) are totals including this step."""
        self.step, self.tokens = step, tokens
        self.n_targets, self.learning_rate = result.n_targets, result.learning_rate
        self.scalars = torch.stack((result.loss, result.grad_norm))
        self.ready_event: torch.cuda.Event | None = None
        if self.scalars.device.type == "cuda":
            stream = torch.cuda.current_stream(self.scalars.device)
            self.scalars = torch.empty(2, pin_memory=True).copy_(self.scalars, non_blocking=True)
            # blocking: the waiting host sleeps instead of spinning, which leaves its core to the prefetch thread.
            self.ready_event = torch.cuda.Event(blocking=True)
            self.ready_event.record(stream)

    def read(self) -> tuple[float, float]:
        """Wait for the step; return the mean loss in nats per target and the gradient norm."""
        if self.ready_event is not None:
            self.ready_event.synchronize()
        loss, grad_norm = self.scalars.tolist()
        return loss, grad_norm
