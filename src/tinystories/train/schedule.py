"""Schedules: the learning rate and Muon's momentum as functions of the step."""

import math

from tinystories.config import ScheduleConfig

# Muon's momentum at step 0, and the fraction of the steps over which it rises.
INITIAL_MOMENTUM, MOMENTUM_WARMUP = 0.85, 0.3


def get_learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `steps`.

    Linear warmup to `peak`, then either cosine decay to `floor * peak` (Loshchilov and Hutter 2016, arXiv 1608.03983),
    or a constant phase and linear decay to `floor * peak` (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395).
    """
    warmup_steps = round(schedule.warmup * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    min_lr = schedule.floor * peak
    if schedule.kind == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(schedule.decay * steps))
    remaining = min(1.0, (steps - step) / decay_steps)
    return min_lr + (peak - min_lr) * max(0.0, remaining)


def get_momentum(step: int, steps: int, final: float) -> float:
    """Return Muon's momentum at a step: linear warmup to `final` (Jordan), since early gradients are soon outdated."""
    initial = min(INITIAL_MOMENTUM, final)
    return initial + (final - initial) * min(1.0, step / max(1.0, MOMENTUM_WARMUP * steps))
