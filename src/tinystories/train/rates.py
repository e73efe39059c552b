"""The learning rates that `auto` stands for: near-best ones for a model's size and batch.

Measured at the reference size and held against other sizes (docs/training.md has the table). Rates grow with the square
root of the batch (Malladi et al. 2022, arXiv 2205.10287), but only so far: Muon's usual rate at half a million tokens a
step is 0.02 as well.
"""

import dataclasses
import math

from tinystories.config import Config

WIDTH, TOKENS = 192, 2048  # of the reference: n_embd, and places in the rows of a step
MUON = 0.02  # the same at all widths: an update's singular values do not depend on the size of a matrix
ADAMW_REST = 0.01  # of embedding, head, norms and biases beside Muon: falls with the root of the width
ADAMW_ALL = 0.003  # of AdamW alone: falls with the width (Yang et al. 2022, arXiv 2203.03466)
LARGEST_GROWTH = 2.0  # for large batches


def settled(config: Config) -> Config:
    """The config with numbers in place of `auto` in optim.learning_rate and optim.muon_rate."""
    optim, narrowness = config.optim, WIDTH / config.model.n_embd
    batch = min(LARGEST_GROWTH, math.sqrt(config.train.batch_size * config.model.n_ctx / TOKENS))
    adamw = ADAMW_REST * math.sqrt(narrowness) if optim.kind == "muon" else ADAMW_ALL * narrowness
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(
            optim,
            learning_rate=rounded(adamw * batch) if optim.learning_rate == "auto" else optim.learning_rate,
            muon_rate=rounded(MUON * batch) if optim.muon_rate == "auto" else optim.muon_rate,
        ),
    )


def rounded(rate: float) -> float:
    """To three digits: nobody can measure more."""
    return float(f"{rate:.3g}")
