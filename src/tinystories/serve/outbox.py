"""How pieces get from the scheduler's thread to the inboxes in the event loop: seldom, and many at once.

A small model computes tokens faster than they can be sent one by one: each would wake the loop and a task, encode an
event and call the system for each client, all with the GIL, for which the engine then waits. So the loop is woken at
once only for what begins or ends an answer; other text waits for `pace_s`, or longer with many streams, so that there
are at most MAX_EVENTS_PER_S of all together. A story grows in steps too small to be seen; a model that takes longer for
a token sends each one as it comes.
"""

import asyncio
import collections
import contextlib
from collections.abc import Callable

from tinystories.serve.errors import ApiError
from tinystories.serve.jobs import Inbox, Piece

MAX_EVENTS_PER_S = 400  # each costs some 50 us: a fiftieth of a core
MAX_PACE_S = 0.1


class Outbox:
    """`add` and `flush` are for the scheduler's thread; everything else runs in the event loop.

    Neither waits for a lock: a deque's `append` and `popleft` are atomic.
    """

    def __init__(self, pace_s: float) -> None:
        self.pace_s = pace_s
        self.loop: asyncio.AbstractEventLoop | None = None
        self._events: collections.deque[tuple[Inbox, Piece | ApiError, bool]] = collections.deque()
        self._has_urgent = False  # only the scheduler's thread uses it
        self._is_looking = False  # the loop will look again without being woken
        self._timer: asyncio.TimerHandle | None = None
        self._due: dict[Inbox, None] = {}  # inboxes with pieces that wait for the timer, in the order of arrival

    def start(self) -> None:
        """Deliver to the running event loop from now on."""
        self.loop = asyncio.get_running_loop()

    def add(self, inbox: Inbox, event: Piece | ApiError, *, is_urgent: bool) -> None:
        """Append a piece or an error; an urgent one is handed over after the next `flush`, others somewhat later."""
        self._events.append((inbox, event, is_urgent))
        self._has_urgent |= is_urgent

    def flush(self) -> None:
        """Wake the loop if something is urgent, or if it does not look by itself."""
        if self._events and (self._has_urgent or not self._is_looking):
            self._has_urgent, self._is_looking = False, True
            self._call_in_loop(self._collect)

    def _call_in_loop(self, callback: Callable[[], None]) -> None:
        assert self.loop is not None, "the outbox has not been started"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self.loop.call_soon_threadsafe(callback)

    def _collect(self) -> None:
        """Hand over what is urgent; the rest too if nothing has been handed over lately."""
        assert self.loop is not None, "called by the loop"
        while self._events:
            inbox, event, is_urgent = self._events.popleft()
            if isinstance(event, Piece):
                inbox.add(event)
            else:
                inbox.fail(event)
            if is_urgent:
                self._due.pop(inbox, None)
                inbox.wake()
            else:
                self._due[inbox] = None
        if self._timer is None:
            for inbox in self._due:
                inbox.wake()
            pace_s = max(self.pace_s, min(MAX_PACE_S, len(self._due) / MAX_EVENTS_PER_S))
            self._due.clear()
            self._timer = self.loop.call_later(pace_s, self._tick)

    def _tick(self) -> None:
        """Hand over what has come since the last time; without any, wait to be woken."""
        self._timer = None
        self._is_looking = False  # before looking: what comes later wakes the loop
        if self._events or self._due:
            self._is_looking = True
            self._collect()
