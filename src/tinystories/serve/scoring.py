"""Log-probabilities of tokens, from raw logits: never after temperature, filters, penalties or biases."""

import collections
import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.protocol import Logits
from tinystories.errors import UserError


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (nats); None for the first token of a prompt of ids, and for -inf.

    `top` lists (id, log-probability) of the most likely tokens and of this one, in descending order; None for the
    first token of a prompt of ids.
    `text` and `offset` say which part of the choice's text the token is; the texts of all tokens join to it.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    text: str = ""
    offset: int = 0


def as_numpy(logits: Logits) -> npt.NDArray[np.float32]:
    """Return logits of any engine as a NumPy array."""
    if isinstance(logits, np.ndarray):
        return logits
    array: npt.NDArray[np.float32] = logits.cpu().numpy()
    return array


def score_token(logits: npt.NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    """Return the log-probability of a token by the raw logits (V,) before it, and the `n_top` most likely ones.

    Raises `UserError` if the logits are not finite.
    """
    largest = logits.max()
    if not np.isfinite(largest):
        raise UserError("the model's logits are not finite; its weights are damaged")
    log_total = float(largest) + math.log(np.exp(logits - largest).sum(dtype=np.float64))
    top_ids: list[Any] = []
    if n_top:
        candidates = np.argpartition(-logits, n_top - 1)[:n_top] if n_top < len(logits) else np.arange(len(logits))
        top_ids = sorted(candidates.tolist(), key=lambda i: (-logits[i], i))
    if token not in top_ids:
        top_ids.append(token)
    # One conversion for both lists: clients compare them for equality.
    top = [(i, float(logits[i]) - log_total) for i in top_ids if np.isfinite(logits[i])]
    return TokenLogprob(token=token, logprob=dict(top).get(token), top=top)


class TokenLog:
    """Joins the tokens of a choice with the text that a detokenizer emits for them, some time later or never."""

    def __init__(self, offset: int = 0) -> None:
        self.n_base = self.n_assigned = offset  # characters of the choice before this log; with a text
        self.unassigned = ""
        self.pending: collections.deque[tuple[TokenLogprob, int]] = collections.deque()
        self.n_tokens, self.sum_logprobs = 0, 0.0

    def add(self, entry: TokenLogprob, n_decoded: int) -> None:
        """Append a token; `n_decoded` is the detokenizer's, after this token."""
        self.pending.append((entry, self.n_base + n_decoded))
        self.n_tokens += 1
        self.sum_logprobs += -math.inf if entry.logprob is None else entry.logprob

    def release(self, piece: str, *, is_last: bool = False, is_cut: bool = False) -> list[TokenLogprob]:
        """Take in emitted text; return the tokens whose text is now complete.

        With `is_last` all are, and the last one gets what remains; with `is_cut`, those are dropped that begin behind
        the end of the text, which a stop string has cut.
        """
        self.unassigned += piece
        n_emitted = self.n_assigned + len(self.unassigned)
        released: list[TokenLogprob] = []
        while self.pending and (is_last or self.pending[0][1] <= n_emitted):
            entry, end = self.pending.popleft()
            if is_cut and self.n_assigned >= n_emitted:
                continue
            is_final = is_last and not self.pending
            length = len(self.unassigned) if is_final else min(end, n_emitted) - self.n_assigned
            entry.offset, entry.text = self.n_assigned, self.unassigned[:length]
            self.unassigned = self.unassigned[length:]
            self.n_assigned += length
            released.append(entry)
        return released
