"""Learning rates: peaks for the setting "auto", and the schedules of the rate and of Muon's momentum.

The automatic peaks are near-optimal for the model width and batch size. They were tuned at one reference size and
compared with half and twice the rate at other sizes (table in docs/training.md). Rates grow with the square root of the
batch size (Malladi et al. 2022, arXiv 2205.10287), up to a limit: Muon's usual rate at half a million tokens per step
is also 0.02.
"""

import dataclasses
import math
from typing import Any

from tinystories.config import Config, ScheduleConfig

# The reference size at which the rates were tuned: n_embd, and tokens per step (batch_size * n_ctx).
REFERENCE_WIDTH, REFERENCE_TOKENS = 192, 2048
# Muon. The same at all widths: the singular values of an update do not depend on the size of the matrix.
MUON_LR = 0.02
# AdamW alongside Muon, for embedding, head, norms and biases. Scales with 1 / sqrt(width).
ADAMW_LR_WITH_MUON = 0.01
# AdamW for all weights. Scales with 1 / width (Yang et al. 2022, arXiv 2203.03466).
ADAMW_LR_ALONE = 0.003
# Limit of the factor for larger batches.
MAX_BATCH_SCALING = 2.0

# Muon's momentum at step 0, and the fraction of the steps over which it rises.
INITIAL_MOMENTUM, MOMENTUM_WARMUP = 0.85, 0.3


def resolve_auto_rates(config: Config) -> Config:
    """Return the config with "auto" in optim.learning_rate and optim.muon_rate replaced by numbers."""
    optim, width_ratio = config.optim, REFERENCE_WIDTH / config.model.n_embd
    batch_scaling = min(MAX_BATCH_SCALING, math.sqrt(config.train.batch_size * config.model.n_ctx / REFERENCE_TOKENS))
    adamw_lr = ADAMW_LR_WITH_MUON * math.sqrt(width_ratio) if optim.kind == "muon" else ADAMW_LR_ALONE * width_ratio
    rates = {"learning_rate": adamw_lr, "muon_rate": MUON_LR}
    numbers: dict[str, Any] = {
        name: round_to_3_digits(rate * batch_scaling) for name, rate in rates.items() if getattr(optim, name) == "auto"
    }
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **numbers))


def round_to_3_digits(rate: float) -> float:
    """Round to three significant digits."""
    return float(f"{rate:.3g}")


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
