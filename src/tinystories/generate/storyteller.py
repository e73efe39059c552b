"""The Python API: a `Storyteller` combines a model, its tokenizer and its default sampling settings."""

import contextlib
import dataclasses
import difflib
import functools
import gc
import secrets
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.engine.engine_config import DEFAULT_ENGINE_CONFIG, EngineConfig
from tinystories.engine.protocol import Engine, TraceableEngine
from tinystories.engine.sampling_state import SamplingState
from tinystories.engine.select import load_engine
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.engine.trace.model import TraceModel
from tinystories.errors import UserError, check_integer, quoted
from tinystories.explain.text_trace import TextTrace, trace_text
from tinystories.generate.batching import Request, Story, check_text, collect_stories, stream_all, truncate_context
from tinystories.generate.next_token import NextToken, analyze_next_token, trace_next_token


class SamplingOptions(TypedDict, total=False):
    """Settings of `SamplingConfig`; those that are missing or None default to the model's own."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repetition_window: int
    penalize_names: bool


class GenerationOptions(SamplingOptions, total=False):
    """Options of `generate` and `stream`; see `Request` and `SamplingConfig`."""

    max_tokens: int
    seed: int  # random by default; see Story.seed
    stop: str | Sequence[str]
    ignore_end: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """A token of a text and its log-probability (nats) given all tokens before it.

    `text` contains U+FFFD if the token holds only part of a character.
    """

    id: int
    text: str
    logprob: float


class Storyteller:
    """Generates and scores stories; created by `tinystories.load`.

    Generates for one caller at a time: a second one gets a `UserError`. `score` may be called from any thread, also
    while a story is being generated.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: SamplingConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self._lock = threading.Lock()  # held while stories are generated

    @classmethod
    def load(cls, model: str | Path, engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG) -> "Storyteller":
        """Load a model directory.

        With a shortlist, only the ids selected by `tinystories quantize --shortlist` are generated, and scoring is not
        available. Raises `UserError` if the model is missing or damaged, or if the engine cannot run on this machine.
        """
        files, engine = load_engine(model, engine_config)
        return cls(engine, files.tokenizer(), files.sampling)

    @overload
    def generate(self, prompt: str = "", *, num: None = None, **options: Unpack[GenerationOptions]) -> Story: ...

    @overload
    def generate(self, prompt: str = "", *, num: int, **options: Unpack[GenerationOptions]) -> list[Story]: ...

    def generate(
        self, prompt: str = "", *, num: int | None = None, **options: Unpack[GenerationOptions]
    ) -> Story | list[Story]:
        """Generate one story that begins with the prompt, or a list of `num` stories.

        Greedy decoding (temperature 0) makes them identical. Raises `UserError` for invalid options.
        """
        if num is not None:
            check_integer("num", num)
        if num is not None and num < 1:
            raise UserError(f"num={num} must be at least 1")
        first = self.build_request(prompt, options)
        requests = (dataclasses.replace(first, number=number) for number in range(num or 1))
        with contextlib.closing(self.events(requests)) as events:
            stories = collect_stories(events)
        return stories[0] if num is None else stories

    def stream(self, prompt: str = "", **options: Unpack[GenerationOptions]) -> Generator[str, None, None]:
        """Yield the text after the prompt as it is generated; it equals the text of `generate` with the same seed.

        The storyteller is busy until the generator is exhausted or closed. Raises `UserError` for invalid options.
        """
        return self._stream_request(self.build_request(prompt, options))

    def _stream_request(self, request: Request) -> Generator[str, None, None]:
        with contextlib.closing(self.events([request])) as events:
            for _, item in events:
                if isinstance(item, str):
                    yield item

    def events(self, requests: Iterable[Request]) -> Generator[tuple[int, str | Story], None, None]:
        """Generate several stories at once; yield (index of the request, piece of text) as text is generated, and
        (index, Story) when a story is complete.

        The requests are consumed only as slots become free. The storyteller is busy from the first item until the
        generator is exhausted or closed; generating in between raises `UserError`.
        """
        with self._exclusive():
            yield from stream_all(self.engine, self.tokenizer, requests)

    def score(self, text: str) -> list[TokenScore]:
        """Return the score of each token of a story and of its closing END, by the protocol of docs/evaluation.md.

        Computed in the engine's precision. On a CPU, `load` defaults to int8; use `precision="fp32"` for exact scores.
        """
        check_text(text, "the text")
        ids = [self.tokenizer.end_id, *self.tokenizer.encode(text), self.tokenizer.end_id]
        (logprobs,) = sliding_window_logprobs(self.engine, [ids])
        token_texts = [self.tokenizer.token_bytes[token].decode("utf-8", "replace") for token in ids[1:-1]]
        return [
            TokenScore(id=token, text=piece, logprob=float(logprob))
            for token, piece, logprob in zip(ids[1:], [*token_texts, END], logprobs, strict=True)
        ]

    @functools.cached_property
    def trace_model(self) -> TraceModel:
        """The engine's weights in fp32, for `trace`: loaded on first use, 4 bytes per parameter."""
        assert isinstance(self.engine, TraceableEngine), "an engine without weights cannot be traced"
        return TraceModel(self.engine.config, self.engine.fp32_weights())

    def trace(self, text: str | Sequence[int], *, window: bool = False) -> TextTrace:
        """Return what the model computes for END and a text, or for ids as they are: hidden states, attention, surprise
        of each token, logit lens.

        `window`: trace the last n_ctx tokens of a text that does not fit into the context; otherwise `UserError`.
        Computed in NumPy, from the engine's weights; with int8 and int4 the engine also rounds activations, and its
        logits differ a little. May be called from any thread, also while a story is being generated.
        """
        if isinstance(text, str):
            check_text(text, "the text")
        return trace_text(self.trace_model, self.tokenizer, text, window=window)

    def next_token(self, prompt: str | TextTrace = "", **sampling: Unpack[SamplingOptions]) -> NextToken:
        """Return the probabilities of the token after a prompt, before and after each step of sampling: those with
        which `generate` samples its first token.

        After a trace: those of its own logits, as the lab shows them, where no activations were rounded. After a text
        the storyteller is busy meanwhile: `UserError` while a story is being generated, and for unknown settings.
        """
        for name in sampling:
            if name not in SamplingOptions.__annotations__:
                raise UserError(f"unknown sampling setting {name}; use {', '.join(SamplingOptions.__annotations__)}")
        overrides: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        settings = dataclasses.replace(self.settings, **overrides)
        if isinstance(prompt, TextTrace):
            return trace_next_token(prompt, settings)
        check_text(prompt, "the prompt")
        prompt_ids = self.tokenizer.encode(prompt)
        context = [self.tokenizer.end_id, *prompt_ids]
        if len(context) > self.engine.config.n_ctx:
            context = truncate_context(context, self.engine.config.n_ctx)
        with self._exclusive():
            try:
                logits = self.engine.prefill(0, context)
            finally:
                self.engine.free(0)
        state = SamplingState(1, self.engine.config.vocab_size)
        state.begin(0, settings, prompt_ids, self.tokenizer.name_ids)
        return analyze_next_token(logits, settings, self.tokenizer, state.seen_mask([0])[0])

    def build_request(self, prompt: str, options: GenerationOptions) -> Request:
        """Return a request with the options merged over the model's settings, and a random seed by default.

        Options that are None are ignored. Raises `UserError` for unknown or invalid options.
        """
        overrides: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        for name in overrides:
            if name not in GenerationOptions.__annotations__:
                close_matches = difflib.get_close_matches(name, GenerationOptions.__annotations__, n=1)
                raise UserError(
                    f"unknown option {name}" + (f"; did you mean {close_matches[0]}?" if close_matches else "")
                )
        sampling_names = {field.name for field in dataclasses.fields(SamplingConfig)} & overrides.keys()
        settings = dataclasses.replace(self.settings, **{name: overrides.pop(name) for name in sampling_names})
        stop = overrides.pop("stop", ())
        if not isinstance(stop, str | Iterable):
            raise UserError(f"stop={quoted(stop)} must be a string or a list of strings, not {type(stop).__name__}")
        overrides.setdefault("seed", secrets.randbits(32))
        return Request(
            prompt=prompt, settings=settings, stop=(stop,) if isinstance(stop, str) else tuple(stop), **overrides
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Reserve the engine for one call: an open stream must not continue on slots that another call has overwritten.

        Raises `UserError` if a stream is still open, or another thread generates.
        """
        if not self._lock.acquire(blocking=False):
            gc.collect()  # closes a stream that nobody can continue, but that is part of a reference cycle
            if not self._lock.acquire(blocking=False):
                raise UserError(
                    "a stream of this storyteller is still open, or another thread is generating; close() the stream or"
                    " wait, or load a second storyteller"
                )
        try:
            yield
        finally:
            self._lock.release()
