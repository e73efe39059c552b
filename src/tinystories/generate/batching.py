"""Continuous batching: generate many stories at once with one engine, streamed and of any length. No torch required.

Every sequence occupies one KV cache slot of the engine. Each iteration prefills the new sequences, runs one decode step
for all others together, and samples one token per sequence. When a sequence ends, its slot goes to the next request.

Stories may be longer than the context: when a slot is full, the older half of its tokens is dropped and the newer half
is prefilled again with positions from 0. This computes fewer than two positions per token, so time is linear in the
number of tokens, and it works for every position encoding.
"""

import dataclasses
import heapq
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Literal

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Logits
from tinystories.engine.sampling_state import SeenIds
from tinystories.errors import UserError, check_bool, check_integer, quoted
from tinystories.generate.detokenizer import StreamingDetokenizer
from tinystories.generate.sampling import SlotSampler, UniformStream

log = logging.getLogger(__name__)

StopReason = Literal["end", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One story to generate. Equal seed, number and settings give the same story, whatever else is in the batch.

    Raises `UserError` if `max_tokens`, `seed`, a stop string or the prompt is invalid or of a wrong type.
    """

    prompt: str = ""
    settings: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    max_tokens: int = 256
    seed: int = 0
    number: int = 0  # index of the story among those with the same seed
    stop: tuple[str, ...] = ()
    ignore_end: bool = False  # start a new story after END, until max_tokens

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens)
        check_integer("seed", self.seed)
        check_bool("ignore_end", self.ignore_end)
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")
        for text in self.stop:
            check_text(text, "a stop string")
        if not all(self.stop):
            raise UserError("a stop string must not be empty; leave it out to stop only at the end of the story")
        check_text(self.prompt, "the prompt")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A generated story.

    `ids` are the generated tokens including END; `seconds` is the wall-clock time including the prefill of the prompt.
    """

    prompt: str
    continuation: str
    ids: tuple[int, ...]
    stop_reason: StopReason
    n_prompt: int  # tokens of the prompt, without the END before it
    seed: int
    number: int
    seconds: float

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation

    @property
    def n_generated(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_s(self) -> float:
        return self.n_generated / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and properties as a JSON-serializable dict."""
        derived = {"text": self.text, "n_generated": self.n_generated, "tokens_per_s": self.tokens_per_s}
        return {**dataclasses.asdict(self), "ids": list(self.ids), **derived}


def check_text(text: object, what: str) -> None:
    """Raise `UserError` unless `text` is a string without lone surrogates; `what` names it in the message.

    Python decodes command-line bytes that are not UTF-8 to lone surrogates.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} must be one string, not {type(text).__name__}: {quoted(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid text at character {error.start}; pass it as UTF-8") from None


def generate_all(engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]) -> list[Story]:
    """Generate all stories, batched over the engine's slots; return them in the order of the requests."""
    return collect_stories(stream_all(engine, tokenizer, requests))


def collect_stories(events: Iterable[tuple[int, str | Story]]) -> list[Story]:
    """Return the stories among the events of `stream_all`, in the order of the requests."""
    stories = {i: item for i, item in events if isinstance(item, Story)}
    return [stories[i] for i in sorted(stories)]


def stream_all(
    engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Generator[tuple[int, str | Story], None, None]:
    """Yield (index of the request, piece of text) as text is generated, and (index, Story) when a story is complete.

    The concatenated pieces of a request equal `Story.continuation`. Requests are consumed only as slots become free, so
    the iterable may be of any length. Closing the generator, or an exception, frees the slots.
    """
    pending = enumerate(requests)
    free_slots = list(range(engine.n_slots))
    active: list[ActiveSequence] = []
    sampler = SlotSampler(engine)
    try:
        while True:
            while free_slots and (next_request := next(pending, None)):
                sequence = ActiveSequence(*next_request, heapq.heappop(free_slots), tokenizer, engine.config.n_ctx)
                active.append(sequence)
                sequence.begin_sampling(sampler)
            if not active:
                return
            for sequence, token in sample_next(engine, active, sampler):
                if piece := sequence.append_token(token):
                    yield sequence.index, piece
            for sequence in [candidate for candidate in active if candidate.stop_reason]:
                active.remove(sequence)
                engine.free(sequence.slot)
                heapq.heappush(free_slots, sequence.slot)
                yield sequence.index, sequence.build_story()
    finally:
        for sequence in active:
            engine.free(sequence.slot)


class ActiveSequence:
    """The state of a story that is being generated in a slot of an engine.

    `context`: the ids that the story continues, by default END and the ids of the prompt (with a warning if they do not
    fit the context of the model).
    """

    def __init__(
        self,
        index: int,
        request: Request,
        slot: int,
        tokenizer: Tokenizer,
        n_ctx: int,
        context: Sequence[int] | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.slot = slot
        self.stop_reason: StopReason | None = None
        self.uniforms = UniformStream(request.seed, request.number)
        self.seen: SeenIds | None = None  # what the repetition penalty applies to, which END is not among
        self.name_ids = (
            frozenset[int]() if request.settings.penalize_names else tokenizer.name_ids
        )  # takes milliseconds
        self.is_stop_token, self.end_id = tokenizer.is_stop_token, tokenizer.end_id
        # Ids that the next token is conditioned on.
        self.context = [tokenizer.end_id, *tokenizer.encode(request.prompt)] if context is None else list(context)
        self.n_prompt = len(self.context) - (self.context[0] == tokenizer.end_id)
        self.n_cached = 0  # how many of them the slot holds: none (prefill needed) or all except the last one
        self.generated_ids: list[int] = []
        has_prompt = bool(request.prompt) or self.n_prompt > 0
        self.detokenizer = StreamingDetokenizer(tokenizer.token_bytes, request.stop, has_prompt=has_prompt)
        self.started_at = time.perf_counter()
        if context is None and len(self.context) > n_ctx:
            log.warning(
                "the prompt of %d tokens does not fit the context of %d; using only its last %d tokens",
                self.n_prompt,
                n_ctx,
                len(truncate_context(self.context, n_ctx)),
            )

    def begin_sampling(self, sampler: SlotSampler) -> None:
        """Set up the sampler for this sequence's slot; call this before the first token is sampled."""
        prompt_ids = [token for token in self.context if token != self.end_id]
        self.seen = sampler.state.begin(self.slot, self.request.settings, prompt_ids, self.name_ids)

    def append_token(self, token: int) -> str:
        """Append a generated token and return the text to emit. Sets `stop_reason` when the story ends."""
        self.generated_ids.append(token)
        if not self.is_stop_token(token):
            self.context.append(token)
            if self.seen is not None:
                self.seen.add(token)
            piece = self.detokenizer.add_token(token)
        elif self.request.ignore_end:
            self.context, self.n_cached = [self.end_id], 0
            piece = self.detokenizer.begin_story()
        else:
            self.stop_reason = "end"
            piece = ""
        if self.detokenizer.stopped:
            self.stop_reason = "stop"
        elif len(self.generated_ids) == self.request.max_tokens:
            self.stop_reason = self.stop_reason or "length"
        return piece + self.detokenizer.finalize() if self.stop_reason else piece

    def build_story(self) -> Story:
        """Return the complete story; `stop_reason` must be set."""
        assert self.stop_reason is not None, "the story has not ended"
        return Story(
            prompt=self.request.prompt,
            continuation=self.detokenizer.text,
            ids=tuple(self.generated_ids),
            stop_reason=self.stop_reason,
            n_prompt=self.n_prompt,
            seed=self.request.seed,
            number=self.request.number,
            seconds=time.perf_counter() - self.started_at,
        )


def truncate_context(context: list[int], n_ctx: int) -> list[int]:
    """Return the newest n_ctx // 2 ids of a context that does not fit into a slot."""
    return context[-max(1, n_ctx // 2) :]


def sample_next(engine: Engine, active: list[ActiveSequence], sampler: SlotSampler) -> list[tuple[ActiveSequence, int]]:
    """Run one forward pass for every active sequence and sample one token for each; return (sequence, token) pairs."""
    sampled: list[tuple[ActiveSequence, int]] = []
    for group, logits in forward(engine, active):
        u = [sequence.uniforms.next() for sequence in group]
        sampled += zip(group, sampler.sample(logits, [sequence.slot for sequence in group], u), strict=True)
    return sampled


def forward(engine: Engine, active: list[ActiveSequence]) -> Iterator[tuple[list[ActiveSequence], Logits]]:
    """Yield groups of sequences with the logits (B, V) after their contexts.

    New sequences and sequences whose slot is full are prefilled one by one; all others decode together in one step.
    """
    n_ctx = engine.config.n_ctx
    decoding = []
    for sequence in active:
        if 0 < sequence.n_cached < n_ctx:
            decoding.append(sequence)
            continue
        if len(sequence.context) > n_ctx:
            sequence.context = truncate_context(sequence.context, n_ctx)
        yield [sequence], engine.prefill(sequence.slot, sequence.context)[None]
        sequence.n_cached = len(sequence.context)
    if decoding:
        yield decoding, engine.step([one.slot for one in decoding], [one.context[-1] for one in decoding])
        for sequence in decoding:
            sequence.n_cached += 1
