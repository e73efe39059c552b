"""Learning rates for the setting "auto": near-optimal ones for the model width and batch size.

Tuned at one reference size and compared with half and twice the rate at other sizes (table in docs/training.md). Rates
grow with the square root of the batch size (Malladi et al. 2022, arXiv 2205.10287), up to a limit: Muon's usual rate
at half a million tokens per step is also 0.02.
"""

import dataclasses
import math

from tinystories.config import Config

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


def resolve_auto_rates(config: Config) -> Config:
    """Return the config with "auto" in optim.learning_rate and optim.muon_rate replaced by numbers."""
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
    """Round to three significant digits."""
    return float(f"{rate:.3g}")
