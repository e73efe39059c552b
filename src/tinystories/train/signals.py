"""SIGINT and SIGTERM, taken by what is under way."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def handle_signals(on_signal: Callable[[int], None], *, ignore_after_error: bool = False) -> Iterator[None]:
    """While it lasts, `ask` is called with the number of each SIGINT or SIGTERM; then the former handlers are back.

    With `deaf_after_errors` both are ignored once an error has ended it: the process has only to say why it ends, and
    whoever started it (torchrun) may tell it to end before it has said so.
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
