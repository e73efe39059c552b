"""Stories in files: .txt, .jsonl, .csv, .parquet, folders of these."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinystories.data.columns import read_parquet
from tinystories.data.reader import Batch, ReadOptions, read_csv, read_jsonl, read_txt
from tinystories.data.tokenizer import one_line
from tinystories.errors import UserError

FORMATS = {".txt": read_txt, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
SMALL_FILE = 16 << 20  # bytes that are hashed whole to tell whether a file has changed


@dataclasses.dataclass(frozen=True, slots=True)
class FileSource:
    """Stories in one or more files, in order."""

    name: str
    paths: tuple[Path, ...]
    held_out: float = 0.005  # of the stories, to validate on where no validation source is given
    revision = ""

    @property
    def bytes_total(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> list[Any]:
        """What changes when the files do; cheap enough to be looked at before each run."""
        return [file_fingerprint(path) for path in self.paths]

    def pinned(self, _revision: str = "") -> "FileSource":
        return self

    def validation(self) -> None:
        """Files have no validation split of their own."""

    def batches(self, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
        """`position` is [number of the file, position in it]."""
        first, at = position or (0, None)
        for number, path in enumerate(self.paths[first:], first):
            for batch in read_file(path, options, at if number == first else None):
                yield dataclasses.replace(batch, position=[number, batch.position])


def read_file(path: Path, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
    """The batches of one file from `position` on (None: from its start); the name's ending says the format.

    Raises `UserError` that names file and place for whatever cannot be read as stories.
    """
    try:
        with path.open("rb") as file:
            yield from FORMATS[path.suffix.lower()](str(path), file, options, position)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def story_files(path: Path, known: Iterable[str]) -> list[Path]:
    """The file itself, or all story files in a folder by name. The names in `known` are for the error."""
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
            if not files:
                raise UserError(f"{path}: no {', '.join(FORMATS)} file in this folder")
        else:
            files = [path]
        for file in files:
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty; give a file with stories")
    except FileNotFoundError:
        known = list(known)
        if str(path) in known:
            raise UserError(f"{path} is a collection, which goes with no other source: name it alone") from None
        names = ", ".join(known)
        raise UserError(f"source {path} is no file, and no known name: {names}, hf:OWNER/NAME") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() not in FORMATS and not path.is_dir():
        raise UserError(f"{path}: unknown format; use {', '.join(FORMATS)} or a folder of these")
    return files


def file_fingerprint(path: Path) -> list[Any]:
    """Small files by their content; large ones by size, time of change and samples of the content."""
    try:
        stat = path.stat()
        small = stat.st_size <= SMALL_FILE
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            for start in range(0, stat.st_size, 1 << 16 if small else stat.st_size // 64):
                file.seek(start)
                digest.update(file.read(1 << 16))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return [path.name, stat.st_size, 0 if small else stat.st_mtime_ns, digest.hexdigest()]
