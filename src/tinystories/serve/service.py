"""`Service`: what all endpoints share. It lives in the event loop; the scheduler's thread is its only companion."""

import asyncio
import threading
import time

from tinystories.engine.protocol import Engine
from tinystories.serve.errors import ApiError, shutting_down
from tinystories.serve.jobs import EndReason, Inbox, Job
from tinystories.serve.metrics import Metrics
from tinystories.serve.model import ServedModel
from tinystories.serve.outbox import Outbox
from tinystories.serve.scheduler import Scheduler
from tinystories.serve.settings import ServerConfig

JOIN_SECONDS = 1.0  # for the engine to end its last call; one that is stuck ends with the process


class Service:
    """A served model with its scheduler."""

    def __init__(self, engine: Engine, model: ServedModel, config: ServerConfig) -> None:
        self.model, self.config = model, config
        self.metrics = Metrics()
        self.inboxes: set[Inbox] = set()  # of the answers in progress
        self.is_draining = False
        self.outbox = Outbox(config.pace_s)
        self.scheduler = Scheduler(engine, model.tokenizer, self.metrics, self.outbox, n_queued=config.n_queued)
        scheduler = self.scheduler
        self.metrics.watch("requests_processing", "Sequences that have a slot", lambda: scheduler.n_busy)
        self.metrics.watch("requests_deferred", "Sequences that wait for a slot", lambda: len(scheduler.queue))
        self.metrics.watch(
            "heartbeat_age_seconds",
            "Since the engine's thread was last seen",
            lambda: time.monotonic() - scheduler.heartbeat,
        )

    def start(self) -> None:
        """Start the scheduler; call this in the event loop."""
        self.outbox.start()
        self.scheduler.start()

    def submit(self, job: Job) -> None:
        """Start a job. `ApiError` if the server is full or shutting down."""
        if self.is_draining:
            raise shutting_down()
        self.scheduler.submit(job)
        self.inboxes.add(job.inbox)

    def end(self, job: Job, reason: EndReason) -> None:
        """End what is left of a job."""
        self.scheduler.cancel(job, reason)
        self.inboxes.discard(job.inbox)

    @property
    def health(self) -> tuple[int, dict[str, object]]:
        """Return the status and body of /health. Waits for nothing, so that it answers whatever the engine does."""
        state = "ok"
        if self.is_draining:
            state = "shutting down"
        elif not self.scheduler.is_alive:
            state = "the engine does not respond"
        counts = {
            "slots": self.scheduler.engine.n_slots,
            "busy": self.scheduler.n_busy,
            "queued": len(self.scheduler.queue),
        }
        return (200 if state == "ok" else 503), {"status": state, **counts}

    async def drain(self) -> None:
        """Refuse new requests, let those in progress finish for `drain_s`, then end the rest with an error."""
        self.is_draining = True
        deadline = time.monotonic() + self.config.drain_s
        while self.inboxes and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.end_all(shutting_down())

    def end_all(self, error: ApiError) -> None:
        """Refuse new requests, and end those in progress with an error."""
        self.is_draining = True
        for inbox in list(self.inboxes):
            inbox.fail(error)

    def close(self) -> None:
        """End the scheduler's thread."""
        self.scheduler.close()
        if self.scheduler.thread is not threading.current_thread() and self.scheduler.thread.ident is not None:
            self.scheduler.thread.join(timeout=JOIN_SECONDS)
