"""Read stories from files: .txt, .jsonl, .csv, .parquet, and folders of these."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tinystories.data.source.arrow import read_parquet
from tinystories.data.source.content import get_format, is_compressed, open_story_file
from tinystories.data.source.pipe import PipeCopy
from tinystories.data.source.reader import ReadOptions, StoryBatch, read_csv, read_jsonl, read_txt
from tinystories.errors import UserError

log = logging.getLogger(__name__)

READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
SMALL_FILE_BYTES = 16 << 20  # files up to this size are hashed completely to detect changes


@dataclasses.dataclass(frozen=True, slots=True)
class FileSource:
    """Stories in one or more files, read in order."""

    name: str
    paths: tuple[Path, ...]
    val_fraction: float = 0.005  # fraction of the stories held out if there is no validation source
    copies: tuple[PipeCopy, ...] = ()  # those of `paths` that are copies of pipes
    revision = ""

    @property
    def total_bytes(self) -> int:
        """Return the size of the text, or 0 if it is unknown because a file is compressed."""
        sizes = [0 if is_compressed(path) else path.stat().st_size for path in self.paths]
        return sum(sizes) if all(sizes) else 0

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
        pipe_names = {copy.path: copy.name for copy in self.copies}
        for file_index, path in enumerate(self.paths[start_index:], start_index):
            start = file_position if file_index == start_index else None
            for batch in read_file(path, options, start, where=pipe_names.get(path, "")):
                yield dataclasses.replace(batch, position=[file_index, batch.position])


def read_file(path: Path, options: ReadOptions, position: Any = None, *, where: str = "") -> Iterator[StoryBatch]:
    """Yield the batches of one file from `position` (None: the start). The file extension selects the format.

    Raises `UserError`, naming the file (as `where`, if given) and the location, for anything that cannot be read as
    stories.
    """
    where = where or str(path)
    with open_story_file(path, where) as file:
        yield from READERS[get_format(path)](where, file, options, position)


def find_story_files(path: Path, known_names: Iterable[str]) -> list[Path]:
    """Return [path] for a file, or all story files below a folder, sorted by path.

    Raises `UserError` if there are none, and for a file that its first bytes show to be unreadable. If `path` does not
    exist, the message lists `known_names`, the names of the known collections.
    """
    try:
        if path.is_dir():
            files = list_folder(path)
            if not files:
                raise UserError(f"{path}: no {', '.join(READERS)} file in this folder")
        else:
            files = [path]
        for file in files:
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty; pass a file that contains stories")
            with open_story_file(file, str(file)):
                pass
    except FileNotFoundError as error:
        refuse_broken_link(Path(error.filename or path))
        known_names = list(known_names)
        if str(path) in known_names:
            raise UserError(
                f"{path} is a named collection and cannot be combined with other sources; pass it alone"
            ) from None
        names = ", ".join(known_names)
        raise UserError(f"source {path} is neither a file nor a known name: {names}, hf:OWNER/NAME") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    if get_format(path) not in READERS and not path.is_dir():
        raise UserError(
            f"{path}: unknown format; use {', '.join(READERS)} (the text formats also compressed, as .txt.gz) or a"
            " folder of these"
        )
    return files


def list_folder(folder: Path) -> list[Path]:
    """Return the story files below a folder, sorted by path.

    Symbolic links are followed, and every folder is searched only once, so links may form a loop. Hidden files and
    folders and those that editors and macOS leave behind are skipped. Other files are counted in a log message.
    Raises `OSError` for a folder that cannot be searched and for a broken link.
    """
    files, skipped_names, visited = [], list[str](), set[tuple[int, int]]()
    for parent, folder_names, file_names in os.walk(folder, onerror=raise_error, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folder_names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folder_names[:] = sorted(name for name in folder_names if not is_clutter(name))
        for name in file_names:
            path = Path(parent, name)
            if is_clutter(name):
                continue
            if get_format(path) not in READERS:
                skipped_names.append(name)
            elif path.stat() and path.is_file():  # `stat` raises for a broken link
                files.append(path)
    if skipped_names:
        examples = ", ".join(sorted(skipped_names)[:3]) + (", ..." if len(skipped_names) > 3 else "")
        log.info("%s: skipping %d files of other formats: %s", folder, len(skipped_names), examples)
    return sorted(files)


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden (.git, .DS_Store, ._a.txt), or a leftover of an editor, Office or macOS."""
    return name.startswith((".", "~$")) or name.endswith(("~", "#")) or name == "__MACOSX"


def raise_error(error: OSError) -> NoReturn:
    raise error


def refuse_broken_link(path: Path) -> None:
    """Raise `UserError` if a path that does not exist is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a broken link to {os.readlink(path)}; fix or remove it")


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
