"""The thread that owns the engine: continuous batching, in which requests join and leave between two steps.

Each round ends what clients have canceled, gives free slots to waiting sequences, computes at most PREFILL_TOKENS of
prompts, decodes one token of all others in one step, and leaves the new text to the outbox. One long prompt therefore
delays nobody by more than one piece of it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Logits
from tinystories.errors import UserError
from tinystories.generate.logit_adjustment import adjust_logits
from tinystories.generate.sampling import SlotSampler
from tinystories.serve.errors import ApiError, invalid, shutting_down
from tinystories.serve.jobs import EndReason, FairQueue, Generation, Job
from tinystories.serve.metrics import Metrics
from tinystories.serve.outbox import Outbox
from tinystories.serve.running import Running
from tinystories.serve.scoring import as_numpy
from tinystories.serve.slots import SlotCache

log = logging.getLogger(__name__)

PREFILL_TOKENS = 256  # of prompts between two steps
MAX_SCORED_BYTES = 8 << 20  # logits of a piece of a prompt that is scored
MAX_QUEUED_PROMPT_TOKENS = 65_536
IDLE_SECONDS = 1.0  # how often an idle thread shows that it is alive
STUCK_SECONDS = 10.0  # a round that takes longer than this is not normal
MAX_RETRY_SECONDS = 60


class Scheduler:
    """Runs jobs on an engine. `submit`, `cancel` and `close` are for the event loop, everything else for the thread."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        outbox: Outbox,
        *,
        n_queued: int | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.metrics = engine, tokenizer, metrics
        self.outbox = outbox
        self.on_death: Callable[[], None] = lambda: None  # called by the thread if it ends by an exception
        self.n_queued = 4 * engine.n_slots if n_queued is None else n_queued
        self.heartbeat = time.monotonic()
        self.n_open = 0  # sequences that wait or run
        self.tokens_per_s = 200.0  # moving average; a guess until something has been measured
        # What both threads use, under this lock. The engine never runs while it is held.
        self.changed = threading.Condition()
        self.queue = FairQueue()
        self.canceled: list[tuple[Job, EndReason]] = []
        self.is_closing = False
        # What only the scheduler's thread uses.
        self.running: list[Running] = []
        self.slots = SlotCache(engine.n_slots)
        self.sampler = SlotSampler(engine)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def capacity(self) -> int:
        """How many sequences may run and wait at once."""
        return self.engine.n_slots + self.n_queued

    @property
    def n_busy(self) -> int:
        """How many slots are in use."""
        return len(self.running)

    @property
    def is_alive(self) -> bool:
        """Whether the thread has been seen lately; never waits for a lock."""
        return self.thread.is_alive() and time.monotonic() - self.heartbeat < STUCK_SECONDS

    def submit(self, job: Job) -> None:
        """Queue a job. `ApiError` 400 if it can never fit, 429 if it does not fit now, 503 after `close`."""
        n_new = len(job.generations)
        if n_new > self.capacity:
            raise invalid(
                f"{n_new} stories in one request are more than this server's {self.capacity} (slots and queue);"
                " send fewer prompts, or a smaller n"
            )
        with self.changed:
            if self.is_closing:
                raise shutting_down()
            n_prompt_tokens = self.queue.n_prompt_tokens + sum(len(one.context) for one in job.generations)
            if self.n_open + n_new > self.capacity or (self.queue and n_prompt_tokens > MAX_QUEUED_PROMPT_TOKENS):
                self.metrics.refused.inc()
                retry_after = min(MAX_RETRY_SECONDS, math.ceil(1 + self.queue.n_tokens / self.tokens_per_s))
                raise ApiError(
                    429,
                    "the server is busy; try again later",
                    code="queue_full",
                    headers={"Retry-After": str(retry_after)},
                )
            self.n_open += n_new
            job.n_open = n_new
            self.queue.push(job)
            self.changed.notify()

    def cancel(self, job: Job, reason: EndReason) -> None:
        """End what is left of a job; nothing happens if it has ended. Its slots are free within one step."""
        with self.changed:
            if job.n_open == 0:
                return
            n_waiting = self.queue.remove(job)
            self._count_ended(job, n_waiting, reason)
            self.canceled.append((job, reason))
            self.changed.notify()

    def close(self) -> None:
        """End the thread after the round that runs. What is still open and not canceled is left as it is."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()

    def _count_ended(self, job: Job, n_ended: int, reason: EndReason) -> None:
        """Count sequences of a job that have ended; the caller holds the lock."""
        job.n_open -= n_ended
        self.n_open -= n_ended
        self.metrics.endings.labels(reason).inc(n_ended)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._round()
            self._end_canceled()
        except BaseException:
            log.exception("the engine's thread has ended by an error")
            self.on_death()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the scheduler is closed."""
        while True:
            self.heartbeat = time.monotonic()
            with self.changed:
                if self.is_closing:
                    return False
                if self.running or self.queue or self.canceled:
                    return True
                self.changed.wait(IDLE_SECONDS)

    def _round(self) -> None:
        started_at = time.monotonic()
        self._end_canceled()
        self._admit()
        self._prefill()
        self.outbox.flush(self.running)  # the first text of a story does not wait for the step of the others
        n_decoded = self._decode()
        self.outbox.flush(self.running)
        seconds = time.monotonic() - started_at
        if n_decoded and seconds > 0:
            self.tokens_per_s += 0.05 * (n_decoded / seconds - self.tokens_per_s)

    def _end_canceled(self) -> None:
        if not self.canceled:  # needs no lock: what comes just now is for the next round
            return
        with self.changed:
            canceled, self.canceled = self.canceled, []
        for job, reason in canceled:
            self._end_job(job, reason)

    def _admit(self) -> None:
        """Give free slots to waiting sequences."""
        while len(self.slots):
            with self.changed:
                if not self.queue:
                    return
                job, generation = self.queue.pop()
            if not job.is_started:
                job.is_started = True
                self.metrics.queue_seconds.observe(time.monotonic() - job.submitted_at)
            self._begin(job, generation)

    def _begin(self, job: Job, generation: Generation) -> None:
        slot, n_cached = self.slots.take(generation.context)
        running = Running(job, generation, slot, n_cached, self.tokenizer, self.engine.config.n_ctx)
        self.running.append(running)
        self.metrics.prompt_tokens.inc(len(generation.context))
        self.metrics.cached_tokens.inc(running.n_filled)
        try:
            running.sequence.begin_sampling(self.sampler)
            running.begin()
            self._emit(running)
        except Exception as error:
            self._fail(job, error)

    def _prefill(self) -> None:
        """Compute at most PREFILL_TOKENS of the contexts that are not in their slots yet, the oldest first."""
        n_left = PREFILL_TOKENS
        for running in [one for one in self.running if one.needs_prefill]:
            if n_left <= 0:
                return
            if not running.has_slot:  # another sequence of its job has failed
                continue
            limit = n_left
            if running.is_scoring:
                limit = min(n_left, max(16, MAX_SCORED_BYTES // (4 * self.engine.config.vocab_size)))
            ids = running.next_ids(limit)
            n_left -= len(ids)
            started_at = time.monotonic()
            is_scoring = running.is_scoring
            logits = self.engine.extend(running.slot, ids, start=running.n_filled, all_logits=is_scoring)
            self.heartbeat = time.monotonic()
            self.metrics.prefill_seconds.inc(self.heartbeat - started_at)
            try:
                running.add_prefilled(ids, logits)
                self._emit(running)
            except Exception as error:
                self._fail(running.job, error)
                continue
            if running.has_logits and not running.stop_reason:
                self._sample([running], logits[-1:] if is_scoring else logits[None])

    def _decode(self) -> int:
        """Decode one token of every sequence whose context is in its slot; return how many there were."""
        decoding = [one for one in self.running if not one.needs_prefill]
        if not decoding:
            return 0
        started_at = time.monotonic()
        slots = [one.slot for one in decoding]
        logits = self.engine.step(slots, [one.sequence.context[-1] for one in decoding])
        self.metrics.decode_seconds.inc(time.monotonic() - started_at)
        self.metrics.decode_steps.inc()
        self.metrics.decoded_slots.inc(len(decoding))
        for one in decoding:
            one.sequence.n_cached += 1
        self._sample(decoding, logits)
        return len(decoding)

    def _sample(self, group: list[Running], logits: Logits) -> None:
        """Sample the next token of each sequence from its row of logits (B, V), and pass its text on."""
        adjusted = adjust_logits(logits, [one.generation.adjustment for one in group])
        u = [one.sequence.uniforms.next() for one in group]
        tokens = self.sampler.sample_unchecked(adjusted, [one.slot for one in group], u)
        self.metrics.predicted_tokens.inc(len(tokens))
        for row, (running, token) in enumerate(zip(group, tokens, strict=True)):
            if not running.has_slot:
                continue
            try:
                if token < 0:
                    raise UserError("the model's logits are not finite; its weights are damaged")
                raw = as_numpy(logits[row]) if running.log is not None else None
                running.add_token(token, raw)
                if running.stop_reason or running.job.first_text_at is None:
                    self._emit(running)
            except Exception as error:  # of this request: the others go on
                self._fail(running.job, error)

    def _emit(self, running: Running) -> None:
        """Hand over what must not wait: the first text of a job, and the last of a sequence, which ends here.

        The outbox takes other text when it is time.
        """
        job, now = running.job, time.monotonic()
        is_first = bool(running.new_texts) and job.first_text_at is None
        if is_first:
            job.first_text_at = now
            self.metrics.first_token_seconds.observe(now - job.submitted_at)
        if running.stop_reason or (is_first and job.inbox.is_stream):
            self.outbox.add(job.inbox, running.take_piece())
        if running.stop_reason:
            n_generated = len(running.sequence.generated_ids)
            if n_generated > 1:
                self.metrics.token_seconds.observe((now - running.started_at) / n_generated)
            self._release(running)
            with self.changed:
                self._count_ended(job, 1, running.stop_reason)

    def _release(self, running: Running) -> None:
        self.running.remove(running)
        running.has_slot = False
        self.slots.give_back(running.slot, running.cached_ids())

    def _end_job(self, job: Job, reason: EndReason) -> None:
        """Free the slots of a job."""
        mine = [running for running in self.running if running.job is job]
        for running in mine:
            self._release(running)
        with self.changed:
            self._count_ended(job, len(mine), reason)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job by an error that concerns it alone."""
        log.error("request %s has failed", job.id, exc_info=error)
        with self.changed:
            self._count_ended(job, self.queue.remove(job), "error")
        self._end_job(job, "error")
        message = str(error) if isinstance(error, UserError) else "the server failed to answer this request"
        self.outbox.add(job.inbox, ApiError(500, message, code="internal_error"))
