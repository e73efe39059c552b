"""The one exception meant for people. Stands below everything else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

MAX_QUOTED_CHARS = 60  # characters of a foreign text in a message


class UserError(Exception):
    """A mistake the user can mend: one line that says what, where and how to mend it.

    Only `cli/command.py` catches it; it prints the line to stderr and exits with code 2.
    """


def quoted(value: object) -> str:
    """A name, key or value out of a file, as a message may hold it: escaped and short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= MAX_QUOTED_CHARS else text[: MAX_QUOTED_CHARS - 3] + "..."


@contextlib.contextmanager
def error_context(where: object) -> Iterator[None]:
    """A `UserError` that does not name `where` gets it in front."""
    try:
        yield
    except UserError as error:
        text = str(error)
        already_named = text.startswith(f"{where} ") or f"{where}/" in text or f"{where}:" in text
        raise error if already_named else UserError(f"{where}: {text}") from None


@contextlib.contextmanager
def os_errors(where: object) -> Iterator[None]:
    """An error of the file system as a `UserError` that names `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """A whole file that may be hostile. `UserError` where it has more than `most` bytes, or is a device or a pipe."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes / 1e6:,.0f} MB; it is not what its name says")
    return data
