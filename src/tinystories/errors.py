"""`UserError`, the one exception that is shown to users, and helpers that build its messages. Imports nothing else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

MAX_QUOTED_CHARS = 60  # longest piece of untrusted text in a message


class UserError(Exception):
    """A mistake the user can fix: one line that says what is wrong, where, and how to fix it.

    `cli/common.py` catches it, prints the line to stderr and exits with code 2.
    """


def quoted(value: object) -> str:
    """Return an untrusted name, key or value as text for a message: escaped, and at most `MAX_QUOTED_CHARS` long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int with more digits than Python converts, or nested too deeply
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 3] + "..."


@contextlib.contextmanager
def error_context(where: object) -> Iterator[None]:
    """Prefix `where` to a `UserError` raised inside the block, unless its message already names it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        already_named = text.startswith(f"{where} ") or f"{where}/" in text or f"{where}:" in text
        raise error if already_named else UserError(f"{where}: {text}") from None


@contextlib.contextmanager
def os_errors(where: object) -> Iterator[None]:
    """Turn an `OSError` raised inside the block into a `UserError` that names `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a whole untrusted file. `UserError` if it is larger than `max_bytes`, or is not a regular file."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(
            f"{path} is larger than {max_bytes / 1e6:,.0f} MB, which is too large for a valid file of this kind"
        )
    return data
