"""Temporary handlers for SIGINT and SIGTERM."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handle_signals(on_signal: Callable[[int], None], *, ignore_after_error: bool = False) -> Iterator[None]:
    """Call `on_signal(number)` on SIGINT and SIGTERM inside the block; restore the previous handlers afterwards.

    With `ignore_after_error`, both signals stay ignored after an exception, so that torchrun cannot kill the process
    before it has printed its error.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    final_handlers = {number: signal.signal(number, lambda signum, _: on_signal(signum)) for number in numbers}
    try:
        yield
    except Exception:
        if ignore_after_error:
            final_handlers = dict.fromkeys(final_handlers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in final_handlers.items():
            signal.signal(number, handler)
