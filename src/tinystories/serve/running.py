"""A sequence that has a slot: its context on the way into the slot, then its tokens on the way to text."""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Logits
from tinystories.generate.batching import ActiveSequence, StopReason, truncate_context
from tinystories.generate.detokenizer import StreamingDetokenizer
from tinystories.serve.jobs import Generation, Job, Piece
from tinystories.serve.scoring import TokenLog, TokenLogprob, as_numpy, score_token


class Running:
    """The state of a sequence in a slot. The scheduler asks for ids and hands in logits and tokens."""

    def __init__(
        self, job: Job, generation: Generation, slot: int, n_cached: int, tokenizer: Tokenizer, n_ctx: int
    ) -> None:
        """`n_cached`: how many ids of the context the slot already holds."""
        self.job, self.generation, self.slot = job, generation, slot
        self.tokenizer, self.n_ctx = tokenizer, n_ctx
        self.started_at = time.monotonic()
        self.sequence = ActiveSequence(generation.index, generation.request, slot, tokenizer, n_ctx, generation.context)
        self.has_slot = True
        self.stop_reason: StopReason | None = None
        self.log = None if generation.n_top is None else TokenLog(len(generation.echo))
        # A prompt that is scored is computed from the beginning: the cache has no logits. Otherwise the last id is
        # computed in any case, for the logits after it.
        self.is_scoring = generation.echo_from is not None
        self.has_logits = False  # whether the last call of `add_prefilled` completed the context
        self.n_filled = 0 if self.is_scoring else min(n_cached, len(generation.context) - 1)
        self.prompt_scores: list[TokenLogprob] = []
        # What the client has not been given yet.
        self.new_texts: list[str] = []
        self.new_tokens: list[TokenLogprob] = []

    @property
    def needs_prefill(self) -> bool:
        """Whether the slot lacks more of the context than its last id."""
        return not 0 < self.sequence.n_cached < self.n_ctx

    @property
    def has_news(self) -> bool:
        """Whether `take_piece` would return something new."""
        return bool(self.new_texts or self.new_tokens or self.stop_reason)

    def take_piece(self) -> Piece:
        """Return what is new since the last call."""
        text, self.new_texts = "".join(self.new_texts), []
        tokens, self.new_tokens = self.new_tokens, []
        return Piece(
            index=self.generation.index,
            text=text,
            tokens=tokens,
            n_generated=len(self.sequence.generated_ids),
            stop_reason=self.stop_reason,
            mean_logprob=self.log.sum_logprobs / self.log.n_tokens if self.log and self.log.n_tokens else 0.0,
        )

    def cached_ids(self) -> list[int]:
        """Return the ids that the slot holds."""
        return self.sequence.context[: self.sequence.n_cached or self.n_filled]

    def begin(self) -> None:
        """Say what can be said before anything is computed: the echo of a prompt that is not scored."""
        if self.is_scoring and self.generation.score_only and len(self.generation.context) == 1:
            self._finish_scoring()  # there is nothing to compute
        elif not self.is_scoring:
            self._say(self.generation.echo)
            self.stop_reason = "length" if self.generation.score_only else None

    def _say(self, text: str, tokens: Sequence[TokenLogprob] = ()) -> None:
        if text:
            self.new_texts.append(text)
        self.new_tokens += tokens

    def next_ids(self, limit: int) -> list[int]:
        """Return at most `limit` ids of the context to append to the slot after its first `n_filled`."""
        sequence = self.sequence
        if sequence.n_cached:  # the slot is full
            sequence.n_cached = self.n_filled = 0
        if not self.generation.score_only and len(sequence.context) > self.n_ctx:
            sequence.context = truncate_context(sequence.context, self.n_ctx)
        # With `score_only`, nothing asks for the logits after the last id.
        end = len(sequence.context) - self.generation.score_only
        return sequence.context[self.n_filled : min(end, self.n_filled + limit)]

    def add_prefilled(self, ids: list[int], logits: Logits) -> None:
        """Take in the logits of `next_ids`: after the last one, or while the prompt is scored after each (T, V)."""
        context, start = self.sequence.context, self.n_filled
        self.n_filled += len(ids)
        self.has_logits = self.n_filled == len(context) - self.generation.score_only
        if self.has_logits:
            self.sequence.n_cached = self.n_filled
        if not self.is_scoring:
            return
        n_top = self.generation.n_top or 0
        for row, position in zip(as_numpy(logits), range(start + 1, start + 1 + len(ids)), strict=True):
            if position < len(context):
                self.prompt_scores.append(score_token(row, context[position], n_top))
        if self.has_logits:
            self._finish_scoring()

    def _finish_scoring(self) -> None:
        """Say the echoed prompt with its log-probabilities."""
        self.is_scoring = False
        context, echo_from = self.sequence.context, self.generation.echo_from
        entries = [TokenLogprob(token=context[0], logprob=None, top=None), *self.prompt_scores][echo_from:]
        detokenizer = StreamingDetokenizer(self.tokenizer.token_bytes)
        echo_log, texts = TokenLog(), []
        for entry in entries:
            if entry.token < len(self.tokenizer.token_bytes):
                texts.append(detokenizer.add_token(entry.token))
            echo_log.add(entry, detokenizer.n_decoded)
        text = "".join(texts) + detokenizer.finalize()
        if self.log is not None:
            self.log = TokenLog(len(text))
        self.stop_reason = "length" if self.generation.score_only else None
        self._say(text, echo_log.release(text, is_last=True))

    def add_token(self, token: int, raw_logits: npt.NDArray[np.float32] | None) -> None:
        """Append a sampled token, and say its text. `raw_logits` (V,): for its log-probability."""
        generation, sequence = self.generation, self.sequence
        entry = None if raw_logits is None else score_token(raw_logits, token, generation.n_top or 0)
        if generation.adjustment is not None:
            generation.adjustment.add_token(token)
        text = sequence.append_token(token)
        if sequence.n_cached == 0:  # a new story follows END
            self.n_filled = 0
        self.stop_reason = sequence.stop_reason
        if text:
            self.new_texts.append(text)
        if self.log is not None and entry is not None:
            self.log.add(entry, sequence.detokenizer.n_decoded)
            is_cut = self.stop_reason == "stop"
            self.new_tokens += self.log.release(text, is_last=bool(self.stop_reason), is_cut=is_cut)
