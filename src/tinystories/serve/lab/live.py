"""The metrics of runs as server-sent events, line by line as the runs write them."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tinystories.serve.answer import PING, STREAM_HEADERS, SlowClientError, send_part
from tinystories.serve.errors import ApiError
from tinystories.serve.lab.run_metrics import MetricsReader, RunProblemError
from tinystories.serve.lab.runs import Run
from tinystories.serve.responses import encode_event
from tinystories.serve.service import Service

MAX_WATCHERS = 32  # connections at once
MAX_FEEDS = 4  # runs of one connection


class Feed:
    """The news of one run: new lines, new samples or checkpoints, and problems, each once."""

    def __init__(self, run: Run, after: int) -> None:
        self.run, self.reader = run, MetricsReader(run.metrics_path, after)
        self.problem: str | None = None
        self.fingerprint: tuple[object, ...] | None = None

    def collect(self) -> dict[str, Any] | None:
        """Return the next event; None if there are no news. Reads files: call it in a thread."""
        event: dict[str, Any] = {"run": self.run.name}
        try:
            update = self.reader.read()
            problem = None
            if update is not None:
                event |= dataclasses.asdict(update)
        except RunProblemError as error:
            problem = str(error)
        if problem != self.problem:
            event["problem"] = self.problem = problem
        fingerprint = self.run.fingerprint()
        if fingerprint != self.fingerprint:
            event["has_changed"], self.fingerprint = True, fingerprint
        return event if len(event) > 1 else None


class Watchers:
    """Counts the open connections. `ApiError` (429) if there are too many."""

    def __init__(self) -> None:
        self.n = 0

    @contextlib.contextmanager
    def enter(self) -> Any:
        if self.n >= MAX_WATCHERS:
            raise ApiError(429, "too many pages watch runs at this moment; close some", headers={"Retry-After": "5"})
        self.n += 1
        try:
            yield
        finally:
            self.n -= 1


class LiveMetrics:
    """An ASGI response that sends the news of some runs until the client leaves or the server shuts down."""

    def __init__(self, service: Service, watchers: Watchers, feeds: Sequence[Feed]) -> None:
        self.service, self.watchers, self.feeds = service, watchers, feeds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = self.service.config

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(config.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise SlowClientError from None

        async def wait_until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        with self.watchers.enter():
            watcher = asyncio.create_task(wait_until_gone())
            try:
                await self._stream(send_in_time, watcher, is_head=scope["method"] == "HEAD")
            except SlowClientError:
                scope.get("state", {}).get("abort", lambda: None)()
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                if not self.service.is_draining:
                    raise
                await send({"type": "http.response.body", "body": b""})  # the server ends at once; nothing is wrong
            finally:
                watcher.cancel()

    async def _stream(self, send: Any, watcher: "asyncio.Task[None]", *, is_head: bool) -> None:
        config = self.service.config
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if is_head:
            await send({"type": "http.response.body", "body": b""})
            return
        await send_part(send, PING)
        sent_at = time.monotonic()
        while not (watcher.done() or self.service.is_draining):
            collected = await asyncio.to_thread(lambda: [feed.collect() for feed in self.feeds])
            if events := [event for event in collected if event is not None]:
                await send_part(send, b"".join(map(encode_event, events)))
                sent_at = time.monotonic()
            elif time.monotonic() > sent_at + config.ping_s:
                await send_part(send, PING)
                sent_at = time.monotonic()
            await asyncio.wait([watcher], timeout=config.poll_s)
        if not watcher.done():
            await send({"type": "http.response.body", "body": b""})
