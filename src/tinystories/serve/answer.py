"""The answer to a completion: waits for pieces, writes JSON or a stream, and notices a client that leaves.

Pure ASGI. Whatever happens, the job ends with the answer: nothing is computed for a client that is gone.
"""

import asyncio
from collections.abc import Callable
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
END_REASONS: dict[int, EndReason] = {503: "shutdown", 504: "deadline"}


class ClientGoneError(Exception):
    """The connection is closed."""


class SlowClientError(Exception):
    """The client has not taken in anything for too long."""


class Answer:
    """An ASGI response that runs a job. Raises `ApiError` if the job is refused, before anything has been sent.

    Most of what it does is done for every chunk of every stream, so it sets few timers: one for the deadline, one for
    pings, and for a send only if it has to wait.
    """

    def __init__(self, service: Service, response_format: ResponseFormat, *, client: str, request_id: str) -> None:
        self.service, self.format, self.plan = service, response_format, response_format.plan
        self.inbox = Inbox(n_ends=0 if self.plan.is_stream else len(self.plan.generations))
        self.job = Job(id=request_id, client=client, generations=self.plan.generations, inbox=self.inbox)
        self.end_reason: EndReason = "error"
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.sent_at = 0.0  # when a stream has last sent something, by the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config, state = self.service.config, scope.get("state", {})
        must_wait: Callable[[], bool] = state.get("must_wait", lambda: True)  # whether `send` would not return at once

        async def send_in_time(message: Message) -> None:
            if not must_wait():
                await send(message)
                return
            try:
                async with asyncio.timeout(config.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise SlowClientError from None

        self.service.submit(self.job)
        watcher = asyncio.create_task(self._watch(receive))
        self._set_timer("deadline", config.timeout_s, lambda: self.inbox.fail(timed_out(config.timeout_s)))
        try:
            await (self._stream(send_in_time) if self.plan.is_stream else self._send_whole(send_in_time))
        except ClientGoneError:
            self.end_reason = "client_gone"
        except SlowClientError:
            self.end_reason = "slow_client"
            state.get("abort", lambda: None)()  # what it has not taken in would be kept forever
            await asyncio.sleep(0)  # uvicorn learns of it
        finally:
            watcher.cancel()
            for timer in self.timers.values():
                timer.cancel()
            self.service.end(self.job, self.end_reason)

    async def _watch(self, receive: Receive) -> None:
        """Tell the inbox when the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.inbox.fail(ClientGoneError())

    def _set_timer(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, callback)

    def _ping(self) -> None:
        """Wake a stream that has sent nothing for `ping_s`, and come back when the next ping may be due."""
        ping_s = self.service.config.ping_s
        seconds_left = self.sent_at + ping_s - asyncio.get_running_loop().time()
        if seconds_left <= 0:
            self.inbox.wake()
        self._set_timer("ping", seconds_left if seconds_left > 0 else ping_s, self._ping)

    async def _take(self) -> list[Piece]:
        """Return the next pieces; none if a ping is due. Raises `ApiError` at the deadline."""
        try:
            return await self.inbox.take()
        except ApiError as error:
            self.end_reason = END_REASONS.get(error.status, "error")
            raise

    async def _send_whole(self, send: Send) -> None:
        whole = sorted(await self._take(), key=lambda piece: piece.index)
        body = msgspec.json.encode(self.format.whole(whole))
        await send_response(send, 200, {"Content-Type": "application/json"}, body)

    async def _stream(self, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if first_chunks := self.format.first_chunks():
            await send_part(send, b"".join(map(encode_event, first_chunks)))
        loop, n_open = asyncio.get_running_loop(), len(self.plan.generations)
        self.sent_at = loop.time()
        self._set_timer("ping", self.service.config.ping_s, self._ping)
        while n_open:
            try:
                pieces = await self._take()
            except ApiError as error:
                # The status has been sent: an event tells it. No [DONE] follows, since the text is not whole.
                await send_part(send, encode_event(error.as_dict()), is_last=True)
                return
            n_open -= sum(piece.stop_reason is not None for piece in pieces)
            events = [encode_event(self.format.chunk(piece)) for piece in pieces] or [PING]
            if not n_open:
                events += [encode_event(self.format.usage_chunk())] * self.plan.with_usage + [DONE]
            await send_part(send, b"".join(events), is_last=not n_open)
            self.sent_at = loop.time()


def timed_out(seconds: float) -> ApiError:
    """Return the error for a request at its deadline; a client need not try again, since it would take as long."""
    message = f"this request took longer than {seconds:g} seconds (--timeout)"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


async def send_part(send: Send, data: bytes, *, is_last: bool = False) -> None:
    """Send a part of a body."""
    await send({"type": "http.response.body", "body": data, "more_body": not is_last})


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
