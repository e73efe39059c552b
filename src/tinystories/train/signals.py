"""SIGINT and SIGTERM, taken by what is under way."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def taken_by(ask: Callable[[int], None], *, deaf_after_errors: bool = False) -> Iterator[None]:
    """While it lasts, `ask` is called with the number of each SIGINT or SIGTERM; then the former handlers are back.

    With `deaf_after_errors` both are ignored once an error has ended it: the process has only to say why it ends, and
    whoever started it (torchrun) may tell it to end before it has said so.
    """

    def handle(number: int, _: FrameType | None) -> None:
        ask(number)

    after = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if deaf_after_errors:
            after = dict.fromkeys(after, signal.SIG_IGN)
        raise
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)
