"""`TextTrace`: a trace with the text of its tokens; what `Storyteller.trace` returns."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.trace.layers import Floats
from tinystories.engine.trace.model import TraceModel
from tinystories.engine.trace.trace import LogitLens, Trace, compute_hidden
from tinystories.errors import UserError
from tinystories.explain.token_text import token_label, token_text
from tinystories.explain.words_html import words_to_html


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextTrace(Trace):
    """A `Trace` of a text. A notebook shows its words, shaded by surprise.

    `texts` and `labels` name the T tokens. Arrays: `ids` (T,), `surprise_bits` (T,), `ranks` (T,), `hidden`
    (n_layer + 1, T, C), `attention` (n_layer, n_head, T, T), `logits()` (T, V). Methods: `logit_lens`, `ablate`,
    `save_pictures`.
    """

    tokenizer: Tokenizer = dataclasses.field(repr=False)

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """The text of each token; U+FFFD where a token holds part of a character."""
        return tuple(token_text(self.tokenizer, token) for token in self.ids.tolist())

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """A label of each token without white space: "·dog", "END"."""
        return tuple(token_label(self.tokenizer, token) for token in self.ids.tolist())

    @property
    def bits_per_byte(self) -> float:
        """Surprise of the tokens after the first, in bits per byte of their text; NaN if there are none.

        docs/evaluation.md also counts the END that closes a whole story.
        """
        token_bytes = self.tokenizer.token_bytes
        n_bytes = sum(len(token_bytes[token]) for token in self.ids[1:].tolist() if token < len(token_bytes))
        return float(self.surprise_bits[1:].sum()) / n_bytes if n_bytes else math.nan

    def _repr_html_(self) -> str:
        return words_to_html(self)

    def save_pictures(
        self, folder: str | Path, *, layer: int | None = None, head: int | None = None, last: int | None = None
    ) -> list[Path]:
        """Write words.png, attention.png, attention-LAYER-HEAD.png and lens.png into a folder; return their paths.

        By default the head is the one that attends most to tokens other than the first and itself. `last`: how many
        tokens at the end of the text the two pictures with labels show. Needs matplotlib: `UserError` without it.
        """
        from tinystories.explain.pictures import save_pictures

        return save_pictures(self, Path(folder), layer=layer, head=head, last=last)

    def as_dict(self, top: int = 5) -> dict[str, Any]:
        """Return the tokens, their surprise, and what each stage predicts after them, as a JSON-serializable dict.

        `top`: how many of the most likely tokens are listed. A surprise of null is that of the first token.
        """
        lens = self.logit_lens(top=top)
        return {
            "n_layer": self.config.n_layer,
            "n_head": self.config.n_head,
            "ablated": [list(pair) for pair in self.ablated],
            "mean_bits": finite(self.mean_bits),
            "bits_per_byte": finite(self.bits_per_byte),
            "tokens": [
                {"id": token, "text": text, "surprise_bits": finite(bits), "rank": rank}
                for token, text, bits, rank in zip(
                    self.ids.tolist(), self.texts, self.surprise_bits.tolist(), self.ranks.tolist(), strict=True
                )
            ],
            "stages": [self.stage_as_dict(lens, stage) for stage in range(len(lens.stages))],
        }

    def stage_as_dict(self, lens: LogitLens, stage: int) -> dict[str, Any]:
        """Return what a stage predicts after each token; lists have one item per token."""
        return {
            "name": stage_name(stage),
            "top": [
                [{"id": token, "text": token_text(self.tokenizer, token), "prob": prob} for token, prob in pairs]
                for pairs in (
                    zip(ids, probs, strict=True)
                    for ids, probs in zip(lens.top_ids[stage].tolist(), rounded(lens.top_probs[stage]), strict=True)
                )
            ],
            "entropy_bits": rounded(lens.entropy_bits[stage]),
            "final_rank": lens.final_ranks[stage].tolist(),
            "next_rank": lens.next_ranks[stage].tolist(),
            "kl_bits": rounded(lens.kl_bits[stage]),
        }


def trace_text(
    model: TraceModel,
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    *,
    window: bool = False,
    known: Floats | None = None,
) -> TextTrace:
    """Return the trace of END and a text, or of ids as they are.

    With `window`, a text longer than the context is traced from its last n_ctx ids. `known` (n_layer + 1, P, C): the
    hidden states of the first P ids, if they are not all, from an earlier trace. Raises `UserError` if the text is
    longer and `window` is not set, or if there are no ids.
    """
    ids = np.asarray([tokenizer.end_id, *tokenizer.encode(text)] if isinstance(text, str) else text)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError("expected a text or a list of token ids, which are integers")
    id_array, hidden = compute_hidden(model, ids, window=window, known=known)
    return TextTrace(model=model, ids=id_array, hidden=hidden, tokenizer=tokenizer)


def stage_name(stage: int) -> str:
    """Return the name of a stage of the logit lens."""
    return f"layer {stage - 1}" if stage else "embedding"


def finite(value: float, digits: int = 4) -> float | None:
    """Return a number for JSON, rounded; None if it is not finite."""
    return round(value, digits) if math.isfinite(value) else None


def rounded(array: Any) -> Any:
    """Return an array of numbers as lists for JSON, rounded to 4 decimals."""
    return np.round(array.astype(np.float64), 4).tolist()
