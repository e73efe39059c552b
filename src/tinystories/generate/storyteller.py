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
from tinystories.engine.choice import load_engine
from tinystories.engine.protocol import Engine
from tinystories.engine.windows import sliding_logprobs
from tinystories.errors import UserError
from tinystories.generate.stories import Request, Story, require_text, stream, tell

if TYPE_CHECKING:
    import torch

N_SLOTS = 8  # stories told at once


class Options(TypedDict, total=False):
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
        self._telling = threading.Lock()

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
        files, chosen = load_engine(
            model,
            engine=engine,
            device=device,
            precision=precision,
            n_slots=n_slots,
            threads=threads,
            shortlist=shortlist,
        )
        return cls(chosen, files.tokenizer(), files.sampling)

    @overload
    def generate(self, prompt: str = "", *, num: None = None, **options: Unpack[Options]) -> Story: ...

    @overload
    def generate(self, prompt: str = "", *, num: int, **options: Unpack[Options]) -> list[Story]: ...

    def generate(self, prompt: str = "", *, num: int | None = None, **options: Unpack[Options]) -> Story | list[Story]:
        """A story that begins with the prompt; with `num` a list of so many, which differ but for greedy settings."""
        if num is not None and num < 1:
            raise UserError(f"num={num} must be at least 1")
        first = self.request(prompt, options)
        requests = (dataclasses.replace(first, number=number) for number in range(num or 1))
        with self.alone():
            stories = tell(self.engine, self.tokenizer, requests)
        return stories[0] if num is None else stories

    def stream(self, prompt: str = "", **options: Unpack[Options]) -> Generator[str, None, None]:
        """The text that follows the prompt, piece by piece; together the same as `generate` gives for the same seed."""
        return self.pieces(self.request(prompt, options))

    def pieces(self, request: Request) -> Generator[str, None, None]:
        with self.alone(), contextlib.closing(stream(self.engine, self.tokenizer, [request])) as events:
            for _, item in events:
                if isinstance(item, str):
                    yield item

    def score(self, text: str) -> list[TokenScore]:
        """Each token of a story and of the END that closes it, by the protocol of `evaluate.bits`.

        In the engine's precision: int8 where `load` was left to choose on a CPU; `precision="fp32"` is exact.
        """
        require_text(text, "the text")
        ids = [self.tokenizer.end_id, *self.tokenizer.encode(text), self.tokenizer.end_id]
        (logprobs,) = sliding_logprobs(self.engine, [ids])
        shown = [self.tokenizer.bytes_of[token].decode("utf-8", "replace") for token in ids[1:-1]]
        return [
            TokenScore(id=token, text=piece, logprob=float(logprob))
            for token, piece, logprob in zip(ids[1:], [*shown, END], logprobs, strict=True)
        ]

    def request(self, prompt: str, options: Options) -> Request:
        """The options laid over the model's own settings."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in Options.__annotations__:
                near = difflib.get_close_matches(name, Options.__annotations__, n=1)
                raise UserError(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        sampling = {field.name for field in dataclasses.fields(SamplingConfig)} & given.keys()
        settings = dataclasses.replace(self.settings, **{name: given.pop(name) for name in sampling})
        stop = given.pop("stop", ())
        given.setdefault("seed", secrets.randbits(32))
        return Request(
            prompt=prompt, settings=settings, stop=(stop,) if isinstance(stop, str) else tuple(stop), **given
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The engine's slots belong to one call at a time: an open stream would go on with another story's memory."""
        if not self._telling.acquire(blocking=False):
            raise UserError(
                "a stream of this storyteller is still open; close() it first, or load a second storyteller"
            )
        try:
            yield
        finally:
            self._telling.release()
