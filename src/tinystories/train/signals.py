"""SIGINT and SIGTERM, taken by what is under way."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def taken_by(ask: Callable[[int], None]) -> Iterator[None]:
    """While it lasts, `ask` is called with the number of each SIGINT or SIGTERM; then the former handlers are back."""

    def handle(number: int, _: FrameType | None) -> None:
        ask(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
