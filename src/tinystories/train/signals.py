"""Temporary handlers for SIGINT and SIGTERM."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handle_signals(on_signal: Callable[[int], None], *, ignore_after_error: bool = False) -> Iterator[None]:
    """Call `on_signal(number)` on SIGINT and SIGTERM inside the block; restore the previous handlers afterwards.

    With `ignore_after_error`, both signals stay ignored after an exception, so that torchrun cannot kill the process
    before it has printed its error.
    """

    def handle(signum: int, _: FrameType | None) -> None:
        on_signal(signum)

    final_handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if ignore_after_error:
            final_handlers = dict.fromkeys(final_handlers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in final_handlers.items():
            signal.signal(number, handler)
