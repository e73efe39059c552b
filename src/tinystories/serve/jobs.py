"""A request as the scheduler sees it: a job of one or more sequences, and the pieces of text that come back."""

import asyncio
import collections
import dataclasses
import time
from typing import Literal

from tinystories.generate.batching import Request, StopReason
from tinystories.generate.logit_adjustment import LogitAdjustment
from tinystories.serve.scoring import TokenLogprob

EndReason = StopReason | Literal["client_gone", "slow_client", "deadline", "shutdown", "error"]


@dataclasses.dataclass(kw_only=True, eq=False)
class Generation:
    """One sequence to generate: choice `index` of its request."""

    index: int
    request: Request
    context: list[int]  # ids that the text follows
    echo: str = ""  # text that precedes the generated one in the answer
    echo_from: int | None = None  # the log-probabilities of context[echo_from:] precede those of the generated tokens
    n_top: int | None = None  # log-probabilities of this many other tokens; None: not even of the sampled one
    adjustment: LogitAdjustment | None = None
    score_only: bool = False  # generate nothing

    @property
    def n_tokens(self) -> int:
        """The most tokens that this sequence costs."""
        return len(self.context) + (0 if self.score_only else self.request.max_tokens)


@dataclasses.dataclass(kw_only=True, slots=True)
class Piece:
    """What one sequence has newly to say. The last piece has a `stop_reason`."""

    index: int
    text: str = ""
    tokens: list[TokenLogprob] = dataclasses.field(default_factory=list)
    n_generated: int = 0  # so far, END included
    stop_reason: StopReason | None = None
    mean_logprob: float = 0.0  # of the generated tokens, in the last piece


class Inbox:
    """Pieces for one client, in the event loop. Those that it has not taken yet are merged, so memory is bounded."""

    def __init__(self, *, n_ends: int = 0) -> None:
        """`n_ends`: `take` waits until this many sequences have ended, for an answer that is not a stream."""
        self.is_stream = n_ends == 0
        self._n_ends = n_ends
        self._changed = asyncio.Event()
        self._pieces: dict[int, Piece] = {}
        self._texts: dict[int, list[str]] = {}  # those of the pieces, joined by `take`: adding them up is quadratic
        self._error: BaseException | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece to what waits for the client, who learns of it by `wake`."""
        waiting = self._pieces.setdefault(piece.index, piece)
        self._texts.setdefault(piece.index, []).append(piece.text)
        if waiting is not piece:
            waiting.tokens += piece.tokens
            waiting.n_generated = piece.n_generated
            waiting.stop_reason, waiting.mean_logprob = piece.stop_reason, piece.mean_logprob
        self._n_ends -= piece.stop_reason is not None

    def wake(self) -> None:
        """Let `take` return what has been added."""
        if self._n_ends <= 0:
            self._changed.set()

    def fail(self, error: BaseException) -> None:
        """End the job: the next `take` raises this error; the first one counts."""
        self._error = self._error or error
        self._changed.set()

    async def take(self) -> list[Piece]:
        """Wait for pieces and return them, one for each index. Raises the error of `fail`."""
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error
        pieces, self._pieces = list(self._pieces.values()), {}
        for piece in pieces:
            piece.text = "".join(self._texts.pop(piece.index))
        return pieces


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """All sequences of one HTTP request. The scheduler's thread owns it from `submit` on."""

    id: str
    client: str  # whom it is for: clients take turns
    generations: list[Generation]
    inbox: Inbox
    submitted_at: float = dataclasses.field(default_factory=time.monotonic)
    first_text_at: float | None = None
    n_open: int = 0  # sequences that have not ended
    is_started: bool = False  # whether a sequence has got a slot


class FairQueue:
    """Sequences that wait for a slot. Clients take turns, and so do the requests of a client."""

    def __init__(self) -> None:
        self._clients: collections.deque[str] = collections.deque()
        self._jobs: dict[str, collections.deque[tuple[Job, collections.deque[Generation]]]] = {}
        self.n_sequences = self.n_tokens = self.n_prompt_tokens = 0

    def __len__(self) -> int:
        return self.n_sequences

    def push(self, job: Job) -> None:
        """Append all sequences of a job."""
        if job.client not in self._jobs:
            self._clients.append(job.client)
        self._jobs.setdefault(job.client, collections.deque()).append((job, collections.deque(job.generations)))
        for generation in job.generations:
            self._count(generation, 1)

    def pop(self) -> tuple[Job, Generation]:
        """Remove and return the next sequence."""
        client = self._clients.popleft()
        jobs = self._jobs[client]
        job, waiting = jobs.popleft()
        generation = waiting.popleft()
        self._count(generation, -1)
        if waiting:
            jobs.append((job, waiting))
        if jobs:
            self._clients.append(client)
        else:
            del self._jobs[client]
        return job, generation

    def remove(self, job: Job) -> int:
        """Remove the sequences of a job that still wait; return how many there were."""
        jobs = self._jobs.get(job.client, collections.deque())
        waiting = [generation for other, rest in jobs if other is job for generation in rest]
        for generation in waiting:
            self._count(generation, -1)
        if waiting:
            remaining = collections.deque(entry for entry in jobs if entry[0] is not job)
            self._jobs[job.client] = remaining
            if not remaining:
                del self._jobs[job.client]
                self._clients.remove(job.client)
        return len(waiting)

    def _count(self, generation: Generation, sign: int) -> None:
        self.n_sequences += sign
        self.n_tokens += sign * generation.n_tokens
        self.n_prompt_tokens += sign * len(generation.context)
