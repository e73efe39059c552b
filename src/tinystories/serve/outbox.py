"""How new text gets from the scheduler's thread to the inboxes in the event loop: seldom, and much at once.

A small model computes tokens faster than they can be sent one by one: each would wake the loop and a task, encode an
event and call the system for each client, all with the GIL, for which the engine then waits. So a sequence keeps its
new text (`Running`) until it is time, and the loop is woken once for the text of all streams. Only what begins or ends
an answer is handed over at once; other text waits for `pace_s`, or longer with many streams, so that there are at most
MAX_CHUNKS_PER_S of all together. A story grows in steps too small to be seen; a model that takes longer for a token
sends each one as it comes.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from tinystories.serve.errors import ApiError
from tinystories.serve.jobs import Inbox, Piece
from tinystories.serve.running import Running

MAX_CHUNKS_PER_S = 200  # each costs some 50 us: a hundredth of a core
MAX_PACE_S = 0.1


class Outbox:
    """For the scheduler's thread; only `start` and what it hands over run in the event loop."""

    def __init__(self, pace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.pace_s, self.clock = pace_s, clock
        self.loop: asyncio.AbstractEventLoop | None = None
        self._events: list[tuple[Inbox, Piece | ApiError]] = []
        self._due_at = -1.0  # when the text of running streams is handed over again

    def start(self) -> None:
        """Deliver to the running event loop from now on."""
        self.loop = asyncio.get_running_loop()

    def add(self, inbox: Inbox, event: Piece | ApiError) -> None:
        """Hand over a piece or an error with the next `flush`."""
        self._events.append((inbox, event))

    def flush(self, running: Iterable[Running]) -> None:
        """Hand over what has been added, and the new text of running streams if it is time; wake the loop for it."""
        now = self.clock()
        if now >= self._due_at:
            for one in running:
                if one.has_news and one.job.inbox.is_stream:
                    self.add(one.job.inbox, one.take_piece())
            n_streams = len({inbox for inbox, _ in self._events})
            if n_streams:
                self._due_at = now + max(self.pace_s, min(MAX_PACE_S, n_streams / MAX_CHUNKS_PER_S))
        if self._events:
            assert self.loop is not None, "the outbox has not been started"
            events, self._events = self._events, []
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would read
                self.loop.call_soon_threadsafe(deliver, events)


def deliver(events: list[tuple[Inbox, Piece | ApiError]]) -> None:
    """Put pieces and errors into their inboxes, whose clients learn of them when all are there."""
    for inbox, event in events:
        if isinstance(event, Piece):
            inbox.add(event)
        else:
            inbox.fail(event)
    for inbox in {inbox: None for inbox, _ in events}:
        inbox.wake()
