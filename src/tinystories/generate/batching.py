"""Stories from an engine: several at once, streamed, of any length. Needs no torch.

Past the context a slot slides: when it is full, its older half is dropped and the newer half read again, with positions
that start at 0. That costs less than two positions for each token, so time is linear in the tokens, and it works for
every kind of positions.
"""

import dataclasses
import heapq
import logging
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal

import numpy as np

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Logits
from tinystories.errors import UserError
from tinystories.generate.detokenizer import StreamingDetokenizer
from tinystories.generate.sampling import UniformStream, sample

log = logging.getLogger(__name__)

StopReason = Literal["end", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One story to tell. The same (seed, number) and the same settings give the same story, whatever runs beside it."""

    prompt: str = ""
    settings: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    max_tokens: int = 256
    seed: int = 0
    number: int = 0  # tells apart the stories of one seed
    stop: tuple[str, ...] = ()
    ignore_end: bool = False  # go on with a new story after an END, until max_tokens

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")
        if not all(self.stop):
            raise UserError("a stop string must not be empty; leave it out to stop only at the end of the story")
        check_text(self.prompt, "the prompt")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """`ids` are those generated, an END included; `seconds` is the wall clock from the prompt's first token."""

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
        return self.prompt + self.continuation

    @property
    def n_generated(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_s(self) -> float:
        return self.n_generated / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        derived = {"text": self.text, "n_generated": self.n_generated, "tokens_per_s": self.tokens_per_s}
        return {**dataclasses.asdict(self), "ids": list(self.ids), **derived}


def check_text(text: str, what: str) -> None:
    """Half a surrogate pair (how Python shows bytes of a command line that are not UTF-8) is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid text at character {error.start}; give it as UTF-8") from None


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    settings: SamplingConfig,
    seed: int = 0,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
    ignore_end: bool = False,
) -> Story:
    """One story, when it is whole."""
    request = Request(
        prompt=prompt, settings=settings, max_tokens=max_tokens, seed=seed, stop=stop, ignore_end=ignore_end
    )
    return generate_all(engine, tokenizer, [request])[0]


def generate_all(engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]) -> list[Story]:
    """All the stories, in the order of the requests; as many at once as the engine has slots."""
    stories = {i: item for i, item in stream_all(engine, tokenizer, requests) if isinstance(item, Story)}
    return [stories[i] for i in sorted(stories)]


def stream_all(
    engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Generator[tuple[int, str | Story], None, None]:
    """(number of the request, piece of its text) as they come; (number, Story) once for each, at its end.

    The pieces of a request make up `Story.continuation`. Requests are taken as slots become free, so there may be any
    number of them. Closing the iterator, or an exception, frees the slots.
    """
    pending = enumerate(requests)
    free_slots = list(range(engine.n_slots))
    active: list[ActiveSequence] = []
    try:
        while True:
            while free_slots and (next_request := next(pending, None)):
                active.append(ActiveSequence(*next_request, heapq.heappop(free_slots), tokenizer, engine.config.n_ctx))
            if not active:
                return
            for sequence, token in sample_next(engine, active):
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
    """A story being told in a slot of an engine."""

    def __init__(self, index: int, request: Request, slot: int, tokenizer: Tokenizer, n_ctx: int) -> None:
        self.index = index
        self.request = request
        self.slot = slot
        self.stop_reason: StopReason | None = None
        self.uniforms = UniformStream(request.seed, request.number)
        prompt = tokenizer.encode(request.prompt)
        self.n_prompt = len(prompt)
        self.seen_ids = set(prompt)  # for the repetition penalty; END is structure, not repetition, and stays out
        self.tokenizer = tokenizer
        self.context = [tokenizer.end_id, *prompt]  # what the slot should hold
        self.n_cached = 0  # how much of it the slot does hold: nothing, or all but the last id
        self.generated_ids: list[int] = []
        self.detokenizer = StreamingDetokenizer(tokenizer.token_bytes, request.stop, has_prompt=bool(request.prompt))
        self.started_at = time.perf_counter()
        if len(self.context) > n_ctx:
            log.warning(
                "the prompt's %d tokens do not fit the context of %d: only its last %d are read",
                self.n_prompt,
                n_ctx,
                len(truncate_context(self.context, n_ctx)),
            )

    def append_token(self, token: int) -> str:
        """Go on by one token; returns the text that may leave. Sets `stop_reason` when the story is over."""
        self.generated_ids.append(token)
        if not self.tokenizer.is_stop_token(token):
            self.context.append(token)
            self.seen_ids.add(token)
            piece = self.detokenizer.add_token(token)
        elif self.request.ignore_end:
            self.context, self.n_cached = [self.tokenizer.end_id], 0
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
        assert self.stop_reason is not None, "the story is not over"
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
    """What a slot keeps of a context that it cannot hold."""
    return context[-max(1, n_ctx // 2) :]


def sample_next(engine: Engine, active: list[ActiveSequence]) -> list[tuple[ActiveSequence, int]]:
    """Bring every slot up to its context and draw one token for each."""
    sampled: list[tuple[ActiveSequence, int]] = []
    for group, logits in forward(engine, active):
        rows_by_settings: dict[SamplingConfig, list[int]] = {}
        for row, sequence in enumerate(group):
            rows_by_settings.setdefault(sequence.request.settings, []).append(row)
        for settings, rows in rows_by_settings.items():
            members = [group[row] for row in rows]
            selected_logits = logits if len(rows) == len(group) else logits[rows]
            sampled += zip(members, sample_rows(members, settings, selected_logits), strict=True)
    return sampled


def sample_rows(members: list[ActiveSequence], settings: SamplingConfig, logits: Logits) -> list[int]:
    u = np.array([sequence.uniforms.next() for sequence in members])
    return sample(logits, settings, u, [sequence.seen_ids for sequence in members])


def forward(engine: Engine, active: list[ActiveSequence]) -> Iterator[tuple[list[ActiveSequence], Logits]]:
    """Logits (B, V) after each context: by one step for all slots that have room, by a prefill for the others."""
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
