"""OpenAI's `logit_bias`, `presence_penalty` and `frequency_penalty`: numbers added to logits before sampling."""

from collections.abc import Mapping, Sequence

import numpy as np

from tinystories.engine.protocol import Logits
from tinystories.generate.sampling import array_namespace


class LogitAdjustment:
    """What is added to the logits of one sequence; the penalties count the tokens generated so far, not the prompt."""

    def __init__(
        self, vocab_size: int, bias: Mapping[int, float], presence_penalty: float, frequency_penalty: float
    ) -> None:
        self.bias, self.presence_penalty, self.frequency_penalty = dict(bias), presence_penalty, frequency_penalty
        self.counts: dict[int, int] = {}
        self.offsets = np.zeros(vocab_size, dtype=np.float32)
        for token, value in self.bias.items():
            self.offsets[token] = value

    def add_token(self, token: int) -> None:
        """Count a generated token."""
        if self.presence_penalty or self.frequency_penalty:
            count = self.counts[token] = self.counts.get(token, 0) + 1
            penalty = self.presence_penalty + self.frequency_penalty * count
            self.offsets[token] = self.bias.get(token, 0.0) - penalty


def adjust_logits(logits: Logits, adjustments: Sequence[LogitAdjustment | None]) -> Logits:
    """Return logits (B, V) with the adjustment of each row added. The argument is not changed."""
    if not any(adjustments):
        return logits
    offsets = np.zeros(logits.shape, dtype=np.float32)
    for row, adjustment in enumerate(adjustments):
        if adjustment is not None:
            offsets[row] = adjustment.offsets
    xp = array_namespace(logits)
    # Rows without an adjustment keep their bits: adding 0 turns -0.0 into 0.0, which sample the same.
    return logits + xp.asarray(offsets, device=logits.device)
