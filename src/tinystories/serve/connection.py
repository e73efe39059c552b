"""The HTTP/1.1 protocol of uvicorn, with limits on the time that a client may take."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 10.0  # to send the header of a request
CLOSE_TIMEOUT_S = 30.0  # to take in what is left of the last answer


class TimedProtocol(H11Protocol):
    """Drops a connection that does not complete a header in time, or does not take in the end of an answer.

    The state of each request has `abort`, which drops the connection at once with what has not been sent, and
    `must_wait`, which says whether `send` would wait because the client has not taken in what came before.
    """

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.access_log = False  # it would show the query of a URL; `access.RequestLog` has a line for each request
        flow = self.flow
        self.app_state = self.app_state | {"abort": transport.abort, "must_wait": lambda: flow.write_paused}
        self.header_timer = self.loop.call_later(HEADER_TIMEOUT_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()
        elif self.header_timer is None:  # a later request on the same connection has begun
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None
