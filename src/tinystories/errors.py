"""The one exception meant for people. Stands below everything else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

LONGEST = 60  # characters of a foreign text in a message


class UserError(Exception):
    """A mistake the user can mend: one line that says what, where and how to mend it.

    Only `cli/command.py` catches it; it prints the line to stderr and exits with code 2.
    """


def shown(value: object) -> str:
    """A name, key or value out of a file, as a message may hold it: escaped and short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """A `UserError` that does not name `where` gets it in front."""
    try:
        yield
    except UserError as error:
        text = str(error)
        named = text.startswith(f"{where} ") or f"{where}/" in text or f"{where}:" in text
        raise error if named else UserError(f"{where}: {text}") from None


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """An error of the file system as a `UserError` that names `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None


def bounded(path: Path, most: int) -> bytes:
    """A whole file that may be hostile. `UserError` where it has more than `most` bytes, or is a device or a pipe."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than {most / 1e6:,.0f} MB; it is not what its name says")
    return data
