"""Traces for the lab: computed in NumPy on a thread of their own, and kept for the next question about the same ids."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, TraceableEngine
from tinystories.engine.trace.layers import Floats
from tinystories.engine.trace.model import TraceModel
from tinystories.errors import UserError
from tinystories.explain.text_trace import TextTrace, trace_text
from tinystories.serve.errors import ApiError, invalid

MAX_TRACES = 32
MAX_TRACE_BYTES = 1 << 27  # of all hidden states that are kept
MIN_KNOWN = 8  # tokens in common from which a kept trace is used
MAX_WAITING = 16  # questions, the one that is being answered included

Result = TypeVar("Result")


class TraceWorker:
    """Computes and keeps traces. Neither the event loop nor the engine's thread waits for it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.model: TraceModel | None = None  # loaded with the first trace: 4 bytes per parameter
        self.traces: OrderedDict[tuple[int, ...], TextTrace] = OrderedDict()  # the most recently used last
        self.n_waiting = 0
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="lab")

    async def ask(self, ids: Sequence[int], answer: Callable[[TextTrace], Result]) -> Result:
        """Return the answer of a function to a trace, computed in the worker's thread.

        `ApiError`: 400 for ids that the model does not take and other mistakes of the client, 429 if too many wait.
        """
        self.check_traceable()
        return await self.run(lambda: answer(self.trace(ids)))

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return the result of a function, called in the worker's thread. `ApiError` as for `ask`."""
        if self.n_waiting >= MAX_WAITING:
            raise ApiError(429, "the lab is busy; try again", code="queue_full", headers={"Retry-After": "1"})
        self.n_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, function)
        except UserError as error:
            raise invalid(str(error), "ids") from None
        finally:
            self.n_waiting -= 1

    def check_traceable(self) -> None:
        """Raise `ApiError` (501) if the engine does not show its weights."""
        if not isinstance(self.engine, TraceableEngine):
            raise ApiError(501, "this engine does not show its weights, so that the lab cannot look into the model")

    def prepare(self) -> None:
        """Load the weights in the worker's thread, so that the first question need not wait for them."""
        if self.model is None and isinstance(self.engine, TraceableEngine):
            self.executor.submit(self.load)

    def load(self) -> TraceModel:
        """Return the served model in fp32. Call it in the worker's thread only."""
        if self.model is None:
            assert isinstance(self.engine, TraceableEngine)
            self.model = TraceModel(self.engine.config, self.engine.fp32_weights())
        return self.model

    def trace(self, ids: Sequence[int]) -> TextTrace:
        """Return the trace of ids. Call it in the worker's thread only.

        A text that begins like one that is kept, as it does while somebody types, is computed from there on. Its
        numbers may differ from those of a whole computation by rounding, about 1e-6.
        """
        model, key = self.load(), tuple(ids)
        trace = self.traces.pop(key, None) or trace_text(model, self.tokenizer, ids, known=self.known_states(key))
        self.traces[key] = trace
        while len(self.traces) > 1 and (len(self.traces) > MAX_TRACES or self.n_bytes > MAX_TRACE_BYTES):
            self.traces.popitem(last=False)
        return trace

    def known_states(self, ids: tuple[int, ...]) -> Floats | None:
        """Return the hidden states of as many of the first ids as a kept trace has; None if these are few."""
        best, n_best = None, MIN_KNOWN - 1
        for key, trace in self.traces.items():
            n_known = min(count_common(key, ids), len(ids) - 1)
            if n_known > n_best:
                best, n_best = trace, n_known
        return None if best is None else best.hidden[:, :n_best]

    @property
    def n_bytes(self) -> int:
        """Bytes of the hidden states that are kept."""
        return sum(trace.hidden.nbytes for trace in self.traces.values())


def count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
