"""One training step: forward and backward passes over micro-batches, clipping, and the optimizer step."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinystories.config import Config
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.device import select_device
from tinystories.engine.torch_engine import TorchEngine
from tinystories.model import GPT
from tinystories.model.cpu_loss import CPULinearDistillation
from tinystories.model.cpu_training import use_cpu_teacher_kernels
from tinystories.model.distillation import DistillationObjective, LinearDistillation
from tinystories.train import distributed
from tinystories.train.distributed import World
from tinystories.train.estimate import auto_micro_batch
from tinystories.train.optimizer.build import build_optimizers
from tinystories.train.optimizer.learning_rate import get_learning_rate, get_momentum
from tinystories.train.prefetch import Batch
from tinystories.train.route import build_objective, select_route
from tinystories.train.teacher import load_teachers


class StepResult:
    """What a launched step measures, over the whole batch. `read` waits for this step, but not for those after it.

    `loss` (mean, in nats per target) and `grad_norm` (before clipping) are scalars on the device. `Tensor.item` would
    wait for everything in the stream, so on CUDA both are copied into pinned memory right after the step, and an event
    marks the end of the copy.
    """

    def __init__(self, step: int, n_targets: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """`step` is the number of steps completed with this one."""
        self.step, self.n_targets, self.learning_rate = step, n_targets, learning_rate
        self.loss, self.grad_norm = loss, grad_norm
        self.scalars = torch.stack((loss, grad_norm))
        self.ready_event: torch.cuda.Event | None = None
        if self.scalars.device.type == "cuda":
            stream = torch.cuda.current_stream(self.scalars.device)
            self.scalars = torch.empty(2, pin_memory=True).copy_(self.scalars, non_blocking=True)
            # blocking: the waiting host sleeps instead of spinning, which leaves its core to the prefetch thread.
            self.ready_event = torch.cuda.Event(blocking=True)
            self.ready_event.record(stream)

    def read(self) -> tuple[float, float]:
        """Wait for the step; return the loss and the gradient norm."""
        if self.ready_event is not None:
            self.ready_event.synchronize()
        loss, grad_norm = self.scalars.tolist()
        return loss, grad_norm


class TrainStep:
    """Model, optimizers and objective, which are equal on all ranks. Call it with the batch of a step.

    It is a function of the weights, the optimizer state, the batch, the seed and the step, so that a resumed run ends
    with the same bits.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        world: World,
        *,
        previous_micro_batch: int = 0,
        previous_route: str | None = None,
        teacher_dirs: Sequence[str] = (),
    ) -> None:
        """Initialize the weights from the seed. `config` has numbers in place of "auto" learning rates.

        `previous_micro_batch` and `previous_route` are those of the run being resumed (0, None: a new run).
        `teacher_dirs` are where the teachers in the settings are.
        """
        self.config, self.world = config, world
        self.device = select_device(world.resolve_device(config.train.device))
        self.micro_batch = auto_micro_batch(config, self.device, previous_micro_batch, world)  # or it does not fit
        self.route = select_route(config, self.device, previous_route, world)
        self.precision = self.route.precision
        teachers = load_teachers(teacher_dirs, config.model, tokenizer, self.device)
        if self.route.cpu_kernels:
            for teacher in teachers:
                use_cpu_teacher_kernels(teacher, bf16=self.route.has_bf16_kernels)
        torch.manual_seed(config.train.seed)
        self.model = GPT(config.model).to(self.device)
        objective: Any = build_objective(self.model, self.route)
        sharded = config.train.shard_optimizer and world.size > 1
        self.optimizers = build_optimizers(self.model, config.optim, sharded, cpu_kernels=self.route.has_bf16_kernels)
        if teachers and config.train.teacher_weight > 0:
            objective = DistillationObjective(
                self.model,
                teachers,
                config.train.teacher_weight,
                config.train.teacher_temperature,
                CPULinearDistillation if self.route.cpu_kernels else LinearDistillation,
            )
        if config.train.compile == "on" or (config.train.compile == "auto" and self.device.type == "cuda"):
            objective = torch.compile(objective)
        self.objective = distributed.wrap_ddp(objective, world, self.device)

    def make_engine(self) -> TorchEngine:
        """Return an engine with one slot that shares the weights being trained."""
        return TorchEngine(self.model, device=self.device, precision=self.precision)

    def __call__(self, batch: Batch) -> StepResult:
        """Run the optimizer step of a batch, of which this rank has its share."""
        with self.route.matmuls():
            return self.run(batch)

    def run(self, batch: Batch) -> StepResult:
        """Do what a call does, with the fp32 matmuls that are set in the process."""
        step = batch.step
        inputs, targets = batch.to_device(self.device)
        self.set_schedules(step)

        # Dropout is seeded per step, so that resuming needs no saved generator state.
        if self.config.model.dropout:
            torch.manual_seed(derive_seed(self.config.train.seed, step, self.world.rank))
        loss_sum = self.accumulate_gradients(inputs, targets, batch.n_targets)
        self.world.all_reduce_(loss_sum)  # only for the metrics: the gradients were reduced by DDP

        # Clip by the global norm over all weights, equal on all ranks. With grad_clip = 0 the norm is only measured.
        max_norm = self.config.optim.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

        # Optimizer step. Setting gradients to None frees their memory and saves the next backward pass an addition.
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        learning_rate = self.optimizers[0].param_groups[0]["lr"]
        return StepResult(step + 1, batch.n_targets, learning_rate, loss_sum / batch.n_targets, grad_norm)

    def set_schedules(self, step: int) -> None:
        """Set the learning rate of each parameter group, scaled from its peak, and Muon's momentum."""
        steps = self.config.train.steps
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = get_learning_rate(step, steps, group["peak"], self.config.schedule)
                if "momentum" in group:
                    group["momentum"] = get_momentum(step, steps, self.config.optim.momentum)

    def accumulate_gradients(self, inputs: Tensor, targets: Tensor, n_targets: int) -> Tensor:
        """Add up the gradient of the mean loss in weight.grad, by a backward pass for each micro-batch.

        Return the sum of the cross-entropies on this rank, on the device. `n_targets` counts the targets of all ranks.
        """
        world = self.world
        loss_sum = torch.zeros((), device=self.device)
        for start in range(0, len(inputs), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            # With several ranks, DDP all-reduces the gradients once, in the last backward pass.
            skip_sync = world.size > 1 and rows.stop < len(inputs)
            with self.objective.no_sync() if skip_sync else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = self.objective(inputs[rows], targets[rows])
                # With teachers, the metrics show the cross-entropy alone, which is comparable between runs.
                loss, cross_entropy = loss if isinstance(loss, tuple) else (loss, loss)
                # `loss` is a sum over this micro-batch. Dividing it by the targets of the whole step, not of the
                # micro-batch, makes the accumulated gradient that of the batch mean, wherever the padding is.
                # DDP averages gradients over the ranks, but their sum is needed: hence the factor world.size.
                (loss / n_targets * world.size).backward()
            loss_sum += cross_entropy.detach()
        return loss_sum


def derive_seed(seed: int, step: int, rank: int) -> int:
    """Return the dropout seed of a step and rank; a pure function, so resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, *[rank] * (rank > 0)]).generate_state(1, np.uint64)[0])
