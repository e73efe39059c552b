"""`UserError`, the one exception shown to users, helpers that build its messages, and checks of argument types."""

import contextlib
import numbers
from collections.abc import Iterable, Iterator

MAX_QUOTED_CHARS = 60  # longest piece of untrusted text in a message


def one_line(text: object) -> str:
    """Return text, which may quote file contents or file names, as one line without control characters."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))


class UserError(Exception):
    """A mistake the user can fix: one line that says what is wrong, where, and how to fix it.

    `cli/common.py` catches it, prints it to stderr and exits with code 2. What a message quotes of files and names is
    escaped here, so that it stays one line without control characters wherever it is shown.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


def quoted(value: object) -> str:
    """Return an untrusted name, key or value as text for a message: escaped, and at most `MAX_QUOTED_CHARS` long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int with more digits than Python converts, or nested too deeply
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 3] + "..."


def list_names(names: Iterable[object]) -> str:
    """Return untrusted names, such as the columns of a table, as text for a message: the first ten, each shortened."""
    texts = [str(name) for name in names]
    shown = [text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 3] + "..." for text in texts[:10]]
    return ", ".join(shown + ([f"... ({len(texts)} in all)"] if len(texts) > 10 else [])) or "none"


@contextlib.contextmanager
def error_context(where: object) -> Iterator[None]:
    """Prefix `where` to a `UserError` raised inside the block, unless its message already names it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        already_named = text.startswith(f"{where} ") or f"{where}/" in text or f"{where}:" in text
        raise error if already_named else UserError(f"{where}: {text}") from None


def check_integer(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is an integer of Python or NumPy. A float or bool is not one."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name}={quoted(value)} must be an integer, not {type(value).__name__}")


def check_number(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is an integer or float of Python or NumPy. A bool is not one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name}={quoted(value)} must be a number, not {type(value).__name__}")


def check_bool(name: str, value: object) -> None:
    """Raise `UserError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={quoted(value)} must be True or False, not {type(value).__name__}")
