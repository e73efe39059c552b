"""Read stories from files: .txt, .jsonl, .csv, .parquet, and folders of these."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tinystories.data.source.arrow import read_parquet
from tinystories.data.source.reader import ReadOptions, StoryBatch, read_csv, read_jsonl, read_txt
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError

READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
SMALL_FILE_BYTES = 16 << 20  # files up to this size are hashed completely to detect changes


@dataclasses.dataclass(frozen=True, slots=True)
class FileSource:
    """Stories in one or more files, read in order."""

    name: str
    paths: tuple[Path, ...]
    val_fraction: float = 0.005  # fraction of the stories held out if there is no validation source
    revision = ""

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> list[Any]:
        """Return JSON that changes when the files do; cheap enough to compute before each run."""
        return [fingerprint_file(path) for path in self.paths]

    def pin_revision(self, _revision: str = "") -> "FileSource":
        """Return this source: only Hub sources have revisions."""
        return self

    def get_validation_split(self) -> None:
        """Return None: files have no validation split of their own."""

    def read_batches(self, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
        """Yield batches from `position`: [index of the file, position in it]; None is the start."""
        start_index, file_position = position or (0, None)
        for file_index, path in enumerate(self.paths[start_index:], start_index):
            for batch in read_file(path, options, file_position if file_index == start_index else None):
                yield dataclasses.replace(batch, position=[file_index, batch.position])


def read_file(path: Path, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Yield the batches of one file from `position` (None: the start). The file extension selects the format.

    Raises `UserError`, naming the file and the location, for anything that cannot be read as stories.
    """
    try:
        with path.open("rb") as file:
            yield from READERS[path.suffix.lower()](str(path), file, options, position)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or sanitize(error)}") from None


def find_story_files(path: Path, known_names: Iterable[str]) -> list[Path]:
    """Return [path] for a file, or all story files below a folder, sorted by path.

    Raises `UserError` if there are none; it lists `known_names`, the names of the known collections.
    """
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
            if not files:
                raise UserError(f"{path}: no {', '.join(READERS)} file in this folder")
        else:
            files = [path]
        for file in files:
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty; pass a file that contains stories")
    except FileNotFoundError:
        known_names = list(known_names)
        if str(path) in known_names:
            raise UserError(
                f"{path} is a named collection and cannot be combined with other sources; pass it alone"
            ) from None
        names = ", ".join(known_names)
        raise UserError(f"source {path} is neither a file nor a known name: {names}, hf:OWNER/NAME") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix.lower() not in READERS and not path.is_dir():
        raise UserError(f"{path}: unknown format; use {', '.join(READERS)} or a folder of these")
    return files


def fingerprint_file(path: Path) -> list[Any]:
    """Fingerprint a small file by its content, a large one by size, modification time and samples of the content."""
    try:
        stat = path.stat()
        is_small = stat.st_size <= SMALL_FILE_BYTES
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            for start in range(0, stat.st_size, 1 << 16 if is_small else stat.st_size // 64):
                file.seek(start)
                digest.update(file.read(1 << 16))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return [path.name, stat.st_size, 0 if is_small else stat.st_mtime_ns, digest.hexdigest()]
