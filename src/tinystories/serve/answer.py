"""The answer to a completion: waits for pieces, writes JSON or a stream, and notices a client that leaves.

Pure ASGI. Whatever happens, the job ends with the answer: nothing is computed for a client that is gone.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from tinystories.serve.errors import ApiError
from tinystories.serve.jobs import EndReason, Inbox, Job, Piece
from tinystories.serve.responses import DONE, ResponseFormat, encode_event
from tinystories.serve.service import Service

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx: do not collect the stream
}
PING = b": waiting\n\n"  # a comment, which clients skip


class ClientGoneError(Exception):
    """The connection is closed."""


class SlowClientError(Exception):
    """The client has not taken in anything for too long."""


class Answer:
    """An ASGI response that runs a job. Raises `ApiError` if the job is refused, before anything has been sent."""

    def __init__(self, service: Service, response_format: ResponseFormat, *, client: str, request_id: str) -> None:
        self.service, self.format, self.plan = service, response_format, response_format.plan
        self.inbox = Inbox()
        self.job = Job(id=request_id, client=client, generations=self.plan.generations, inbox=self.inbox)
        self.end_reason: EndReason = "error"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = self.service.config

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(config.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise SlowClientError from None

        self.service.submit(self.job)
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream(send_in_time) if self.plan.is_stream else self._send_whole(send_in_time))
        except ClientGoneError:
            self.end_reason = "client_gone"
        except SlowClientError:
            self.end_reason = "slow_client"
            scope.get("state", {}).get("abort", lambda: None)()  # what it has not taken in would be kept forever
            await asyncio.sleep(0)  # uvicorn learns of it
        finally:
            watcher.cancel()
            self.service.end(self.job, self.end_reason)

    async def _watch(self, receive: Receive) -> None:
        """Tell the inbox when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.inbox.fail(ClientGoneError())

    async def _take(self, send_ping: Callable[[], Awaitable[None]] | None = None) -> list[Piece]:
        """Return the next pieces; ping now and then until they come. Raises `ApiError` at the deadline."""
        config = self.service.config
        deadline = self.job.submitted_at + config.timeout_s
        while True:
            remaining = deadline - time.monotonic()
            try:
                async with asyncio.timeout(min(remaining, config.ping_s) if send_ping else remaining):
                    return await self.inbox.take()
            except TimeoutError:
                if time.monotonic() >= deadline:
                    self.end_reason = "deadline"
                    raise timed_out(config.timeout_s) from None
            except ApiError as error:
                self.end_reason = "shutdown" if error.status == 503 else "error"
                raise
            if send_ping:
                await send_ping()

    async def _send_whole(self, send: Send) -> None:
        whole = [Piece(index=i) for i in range(len(self.plan.generations))]
        texts: list[list[str]] = [[] for _ in whole]
        while not all(piece.stop_reason for piece in whole):
            for piece in await self._take():
                mine = whole[piece.index]
                texts[piece.index].append(piece.text)
                mine.tokens += piece.tokens
                mine.n_generated, mine.stop_reason = piece.n_generated, piece.stop_reason
                mine.mean_logprob = piece.mean_logprob
        for piece, parts in zip(whole, texts, strict=True):
            piece.text = "".join(parts)
        body = msgspec.json.encode(self.format.whole(whole))
        await send_response(send, 200, {"Content-Type": "application/json"}, body)

    async def _stream(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for chunk in self.format.first_chunks():
                await send_part(send, encode_event(chunk))
            n_open = len(self.plan.generations)
            while n_open:
                pieces = await self._take(lambda: send_part(send, PING))
                n_open -= sum(piece.stop_reason is not None for piece in pieces)
                await send_part(send, b"".join([encode_event(self.format.chunk(piece)) for piece in pieces]))
            if self.plan.with_usage:
                await send_part(send, encode_event(self.format.usage_chunk()))
            await send_part(send, DONE)
        except ApiError as error:
            # The status has been sent: an event tells it. No [DONE] follows, since the text is not whole.
            await send_part(send, encode_event(error.as_dict()))
        await send({"type": "http.response.body", "body": b""})


def timed_out(seconds: float) -> ApiError:
    """Return the error for a request at its deadline; a client need not try again, since it would take as long."""
    message = f"this request took longer than {seconds:g} seconds (--timeout)"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


async def send_part(send: Send, data: bytes) -> None:
    """Send a part of a body."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def send_response(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    """Send a whole response."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, extra_headers: dict[str, Any] | None = None) -> None:
    """Send an error in OpenAI's form."""
    headers = {"Content-Type": "application/json"} | error.headers | (extra_headers or {})
    await send_response(send, error.status, headers, msgspec.json.encode(error.as_dict()))
