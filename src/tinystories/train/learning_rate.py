"""The learning rates that `auto` stands for: near-best ones for a model's size and batch.

Measured at the reference size and held against other sizes (docs/training.md has the table). Rates grow with the square
root of the batch (Malladi et al. 2022, arXiv 2205.10287), but only so far: Muon's usual rate at half a million tokens a
step is 0.02 as well.
"""

import dataclasses
import math

from tinystories.config import Config

REFERENCE_WIDTH, REFERENCE_TOKENS = 192, 2048  # of the reference: n_embd, and places in the rows of a step
MUON_LR = 0.02  # the same at all widths: an update's singular values do not depend on the size of a matrix
ADAMW_LR_WITH_MUON = 0.01  # of embedding, head, norms and biases beside Muon: falls with the root of the width
ADAMW_LR_ALONE = 0.003  # of AdamW alone: falls with the width (Yang et al. 2022, arXiv 2203.03466)
MAX_BATCH_SCALING = 2.0  # for large batches


def resolve_auto_rates(config: Config) -> Config:
    """The config with numbers in place of `auto` in optim.learning_rate and optim.muon_rate."""
    optim, width_ratio = config.optim, REFERENCE_WIDTH / config.model.n_embd
    batch_scaling = min(MAX_BATCH_SCALING, math.sqrt(config.train.batch_size * config.model.n_ctx / REFERENCE_TOKENS))
    adamw_lr = ADAMW_LR_WITH_MUON * math.sqrt(width_ratio) if optim.kind == "muon" else ADAMW_LR_ALONE * width_ratio
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(
            optim,
            learning_rate=round_to_3_digits(adamw_lr * batch_scaling)
            if optim.learning_rate == "auto"
            else optim.learning_rate,
            muon_rate=round_to_3_digits(MUON_LR * batch_scaling) if optim.muon_rate == "auto" else optim.muon_rate,
        ),
    )


def round_to_3_digits(rate: float) -> float:
    """To three digits: nobody can measure more."""
    return float(f"{rate:.3g}")
