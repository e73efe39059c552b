"""The Python interface: a model, its tokenizer and its default sampling, ready to tell and to score."""

import contextlib
import dataclasses
import difflib
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.engine.protocol import Engine
from tinystories.engine.select import load_engine
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.errors import UserError
from tinystories.generate.batching import Request, Story, check_text, generate_all, stream_all

if TYPE_CHECKING:
    import torch

N_SLOTS = 8  # stories told at once


class GenerationOptions(TypedDict, total=False):
    """How to tell; see `Request` and `SamplingConfig`. What is not given is the model's own setting."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int  # chosen at random where not given; the Story says which
    stop: str | Sequence[str]
    ignore_end: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """A token of a text and its log-probability (nats) after all before it.

    `text` holds U+FFFD where a character is made of several tokens.
    """

    id: int
    text: str
    logprob: float


class Storyteller:
    """Tells and scores stories; made by `tinystories.load`. Tells for one caller at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: SamplingConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        engine: str = "auto",
        device: "str | torch.device" = "auto",
        precision: str = "auto",
        n_slots: int = N_SLOTS,
        threads: int | None = None,
        shortlist: bool = False,
    ) -> "Storyteller":
        """From a model directory. `UserError` where it is missing or damaged, or where the engine cannot run here.

        With `shortlist` it writes only the ids that `tinystories pack --shortlist` chose, and scores nothing.
        """
        files, loaded_engine = load_engine(
            model,
            engine=engine,
            device=device,
            precision=precision,
            n_slots=n_slots,
            threads=threads,
            shortlist=shortlist,
        )
        return cls(loaded_engine, files.tokenizer(), files.sampling)

    @overload
    def generate(self, prompt: str = "", *, num: None = None, **options: Unpack[GenerationOptions]) -> Story: ...

    @overload
    def generate(self, prompt: str = "", *, num: int, **options: Unpack[GenerationOptions]) -> list[Story]: ...

    def generate(
        self, prompt: str = "", *, num: int | None = None, **options: Unpack[GenerationOptions]
    ) -> Story | list[Story]:
        """A story that begins with the prompt; with `num` a list of so many, which differ but for greedy settings."""
        if num is not None and num < 1:
            raise UserError(f"num={num} must be at least 1")
        first = self.build_request(prompt, options)
        requests = (dataclasses.replace(first, number=number) for number in range(num or 1))
        with self._exclusive():
            stories = generate_all(self.engine, self.tokenizer, requests)
        return stories[0] if num is None else stories

    def stream(self, prompt: str = "", **options: Unpack[GenerationOptions]) -> Generator[str, None, None]:
        """The text that follows the prompt, piece by piece; together the same as `generate` gives for the same seed."""
        return self._stream_request(self.build_request(prompt, options))

    def _stream_request(self, request: Request) -> Generator[str, None, None]:
        with self._exclusive(), contextlib.closing(stream_all(self.engine, self.tokenizer, [request])) as events:
            for _, item in events:
                if isinstance(item, str):
                    yield item

    def score(self, text: str) -> list[TokenScore]:
        """Each token of a story and of the END that closes it, by the protocol of `evaluate.bits`.

        In the engine's precision: int8 where `load` was left to choose on a CPU; `precision="fp32"` is exact.
        """
        check_text(text, "the text")
        ids = [self.tokenizer.end_id, *self.tokenizer.encode(text), self.tokenizer.end_id]
        (logprobs,) = sliding_window_logprobs(self.engine, [ids])
        token_texts = [self.tokenizer.token_bytes[token].decode("utf-8", "replace") for token in ids[1:-1]]
        return [
            TokenScore(id=token, text=piece, logprob=float(logprob))
            for token, piece, logprob in zip(ids[1:], [*token_texts, END], logprobs, strict=True)
        ]

    def build_request(self, prompt: str, options: GenerationOptions) -> Request:
        """The options laid over the model's own settings."""
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
        overrides.setdefault("seed", secrets.randbits(32))
        return Request(
            prompt=prompt, settings=settings, stop=(stop,) if isinstance(stop, str) else tuple(stop), **overrides
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The engine's slots belong to one call at a time: an open stream would go on with another story's memory."""
        if not self._lock.acquire(blocking=False):
            raise UserError(
                "a stream of this storyteller is still open; close() it first, or load a second storyteller"
            )
        try:
            yield
        finally:
            self._lock.release()
