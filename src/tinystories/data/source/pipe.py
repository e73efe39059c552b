"""Stories from a pipe: `prepare -`, /dev/stdin, a FIFO, or process substitution such as <(zcat stories.txt.gz)."""

import dataclasses
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

from tinystories.data.source.content import PARQUET_MAGIC, decompress, get_format, read_head
from tinystories.errors import UserError

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


@dataclasses.dataclass(frozen=True, eq=False)
class PipeCopy:
    """What a pipe contained, in a temporary file: it is read several times, and a pipe can be read only once.

    The file is removed together with the object.
    """

    name: str  # of the pipe, for messages
    path: Path


def is_pipe(path: Path) -> bool:
    """Whether a path names standard input, an open file descriptor, or a FIFO."""
    if str(path) in STDIN or path.parent in (Path("/dev/fd"), Path("/proc/self/fd")):
        return True
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def copy_pipe(path: Path, formats: tuple[str, ...]) -> PipeCopy:
    """Read a pipe to its end and return the copy, whose suffix is its format.

    The format is the suffix of the pipe if that is one of `formats`, otherwise it is recognized: parquet, .jsonl if the
    first character is `{`, else .txt. Raises `UserError` if the pipe is empty or cannot be read, or if the copy cannot
    be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="tinystories-"))
    try:
        copy = PipeCopy(str(path), write_copy(path, folder / "pipe", formats))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(copy, shutil.rmtree, folder, ignore_errors=True)
    return copy


def write_copy(path: Path, copy: Path, formats: tuple[str, ...]) -> Path:
    """Copy the pipe to a file and return the path of the file, which is `copy` with the suffix of its format."""
    try:
        source = open(0, "rb", closefd=False) if str(path) in STDIN else path.open("rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with source, copy.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except OSError as error:
        raise UserError(
            f"{path} cannot be copied to {copy}: {error.strerror}; set TMPDIR to a folder with more space"
        ) from None
    if copy.stat().st_size == 0:
        raise UserError(f"{path} is empty; pipe stories into it")
    suffix = get_format(path) if get_format(path) in formats else recognize_format(copy)
    named_copy = copy.replace(copy.with_suffix(suffix))
    os.utime(named_copy, (0, 0))  # the same content has the same fingerprint, whenever it is copied
    return named_copy


def recognize_format(path: Path) -> str:
    """Return the suffix of the format that the first bytes of a file show: .parquet, .jsonl or .txt."""
    with path.open("rb") as raw:
        head = read_head(decompress(raw))
    if head.startswith(PARQUET_MAGIC):
        return ".parquet"
    return ".jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else ".txt"
