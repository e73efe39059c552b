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
from tinystories.generate.sampling import Uniforms, next_ids
from tinystories.generate.text import TextStream

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
        require_text(self.prompt, "the prompt")


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


def require_text(text: str, what: str) -> None:
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
    return tell(engine, tokenizer, [request])[0]


def tell(engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]) -> list[Story]:
    """All the stories, in the order of the requests; as many at once as the engine has slots."""
    stories = {i: item for i, item in stream(engine, tokenizer, requests) if isinstance(item, Story)}
    return [stories[i] for i in sorted(stories)]


def stream(
    engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Generator[tuple[int, str | Story], None, None]:
    """(number of the request, piece of its text) as they come; (number, Story) once for each, at its end.

    The pieces of a request make up `Story.continuation`. Requests are taken as slots become free, so there may be any
    number of them. Closing the iterator, or an exception, frees the slots.
    """
    waiting = enumerate(requests)
    free = list(range(engine.n_slots))
    live: list[Telling] = []
    try:
        while True:
            while free and (next_one := next(waiting, None)):
                live.append(Telling(*next_one, heapq.heappop(free), tokenizer, engine.config.n_ctx))
            if not live:
                return
            for telling, token in next_tokens(engine, live):
                if piece := telling.take(token):
                    yield telling.index, piece
            for telling in [one for one in live if one.stop_reason]:
                live.remove(telling)
                engine.free(telling.slot)
                heapq.heappush(free, telling.slot)
                yield telling.index, telling.story()
    finally:
        for telling in live:
            engine.free(telling.slot)


class Telling:
    """A story being told in a slot of an engine."""

    def __init__(self, index: int, request: Request, slot: int, tokenizer: Tokenizer, n_ctx: int) -> None:
        self.index = index
        self.request = request
        self.slot = slot
        self.stop_reason: StopReason | None = None
        self.uniforms = Uniforms(request.seed, request.number)
        prompt = tokenizer.encode(request.prompt)
        self.n_prompt = len(prompt)
        self.seen = set(prompt)  # for the repetition penalty; END is structure, not repetition, and stays out
        self.tokenizer = tokenizer
        self.context = [tokenizer.end_id, *prompt]  # what the slot should hold
        self.in_slot = 0  # how much of it the slot does hold: nothing, or all but the last id
        self.generated: list[int] = []
        self.out = TextStream(tokenizer.bytes_of, request.stop, begun=bool(request.prompt))
        self.began = time.perf_counter()
        if len(self.context) > n_ctx:
            log.warning(
                "the prompt's %d tokens do not fit the context of %d: only its last %d are read",
                self.n_prompt,
                n_ctx,
                len(newer_half(self.context, n_ctx)),
            )

    def take(self, token: int) -> str:
        """Go on by one token; returns the text that may leave. Sets `stop_reason` when the story is over."""
        self.generated.append(token)
        if not self.tokenizer.ends(token):
            self.context.append(token)
            self.seen.add(token)
            piece = self.out.push(token)
        elif self.request.ignore_end:
            self.context, self.in_slot = [self.tokenizer.end_id], 0
            piece = self.out.separate()
        else:
            self.stop_reason = "end"
            piece = ""
        if self.out.stopped:
            self.stop_reason = "stop"
        elif len(self.generated) == self.request.max_tokens:
            self.stop_reason = self.stop_reason or "length"
        return piece + self.out.finish() if self.stop_reason else piece

    def story(self) -> Story:
        assert self.stop_reason is not None, "the story is not over"
        return Story(
            prompt=self.request.prompt,
            continuation=self.out.text,
            ids=tuple(self.generated),
            stop_reason=self.stop_reason,
            n_prompt=self.n_prompt,
            seed=self.request.seed,
            number=self.request.number,
            seconds=time.perf_counter() - self.began,
        )


def newer_half(context: list[int], n_ctx: int) -> list[int]:
    """What a slot keeps of a context that it cannot hold."""
    return context[-max(1, n_ctx // 2) :]


def next_tokens(engine: Engine, live: list[Telling]) -> list[tuple[Telling, int]]:
    """Bring every slot up to its context and draw one token for each."""
    drawn: list[tuple[Telling, int]] = []
    for group, logits in read(engine, live):
        by_settings: dict[SamplingConfig, list[int]] = {}
        for row, telling in enumerate(group):
            by_settings.setdefault(telling.request.settings, []).append(row)
        for settings, rows in by_settings.items():
            members = [group[row] for row in rows]
            wanted = logits if len(rows) == len(group) else logits[rows]
            drawn += zip(members, draw_for(members, settings, wanted), strict=True)
    return drawn


def draw_for(members: list[Telling], settings: SamplingConfig, logits: Logits) -> list[int]:
    u = np.array([telling.uniforms.next() for telling in members])
    return next_ids(logits, settings, u, [telling.seen for telling in members])


def read(engine: Engine, live: list[Telling]) -> Iterator[tuple[list[Telling], Logits]]:
    """Logits (B, V) after each context: by one step for all slots that have room, by a prefill for the others."""
    n_ctx = engine.config.n_ctx
    stepping = []
    for telling in live:
        if 0 < telling.in_slot < n_ctx:
            stepping.append(telling)
            continue
        if len(telling.context) > n_ctx:
            telling.context = newer_half(telling.context, n_ctx)
        yield [telling], engine.prefill(telling.slot, telling.context)[None]
        telling.in_slot = len(telling.context)
    if stepping:
        yield stepping, engine.step([one.slot for one in stepping], [one.context[-1] for one in stepping])
        for telling in stepping:
            telling.in_slot += 1
