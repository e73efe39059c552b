"""Learning rate as a function of the step."""

import math

from tinystories.config import ScheduleConfig

FIRST_MOMENTUM, RISE = 0.85, 0.3  # of Muon; the rise is a fraction of the steps


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`.

    A linear rise to `peak`, then either a cosine to `floor * peak` (Loshchilov and Hutter 2016, arXiv 1608.03983) or a
    stable stretch and a linear fall to it (warm-up-stable-decay, Hu et al. 2024, arXiv 2404.06395).
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.floor * peak
    if schedule.kind == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    fall = max(1, round(schedule.decay * steps))
    left = min(1.0, (steps - step) / fall)
    return floor + (peak - floor) * max(0.0, left)


def momentum(step: int, steps: int, final: float) -> float:
    """Muon's momentum: rises in a line to `final` (Jordan's warm-up), since early gradients are soon out of date."""
    first = min(FIRST_MOMENTUM, final)
    return first + (final - first) * min(1.0, step / max(1.0, RISE * steps))
