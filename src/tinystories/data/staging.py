"""The unfinished output of `prepare`: files that grow, and a journal that says up to where they are whole.

Killed at any moment, even by power loss, a draft goes on from its journal: data is on the disk before the journal that
counts it, and what lies behind the journal's sizes is cut off.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

from tinystories.errors import UserError

log = logging.getLogger(__name__)

JOURNAL_INTERVAL_SECONDS = 1.0  # of work that a kill can cost, besides the batch in hand


@dataclasses.dataclass(kw_only=True, slots=True)
class Journal:
    """All that going on needs to know."""

    revisions: list[str] = dataclasses.field(default_factory=list)  # of the source and the validation source
    stage: int = 0  # which of the sources is in work
    position: Any = None  # in that source
    read: int = 0  # bytes of all sources behind the position
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the growing files
    text_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the stories in each split
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of dropped stories, by reason


class StagingDir:
    """A draft folder open for writing, used as a context manager; leaving it early keeps it for the next run."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        """Goes on with a draft of the same request, clears one of another; refuses a folder that is no draft."""
        self.folder = folder
        self.data_dir = folder / "data"  # what is published; the rest serves going on
        self.journal = Journal()
        self._files: dict[str, BinaryIO] = {}
        own_files = (folder / "request.json", folder / "lock")
        if folder.exists() and any(folder.iterdir()) and not any(path.exists() for path in own_files):
            raise UserError(f"{folder} is in the way and no draft of prepare; remove it or name another --out")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = acquire_lock(folder)
        self._resume(spec)
        self.data_dir.mkdir(exist_ok=True)
        write_json(folder / "request.json", spec)
        self._saved_at = time.monotonic()

    def _resume(self, spec: dict[str, Any]) -> None:
        journal = read_json(self.folder / "journal.json") or {}
        sizes: dict[str, int] = journal.get("sizes", {})
        is_complete = all(
            (self.folder / n).exists() and (self.folder / n).stat().st_size >= s for n, s in sizes.items()
        )
        leftovers = [path for path in self.folder.iterdir() if path.name != "lock"]
        if read_json(self.folder / "request.json") == spec and is_complete:
            self.journal = Journal(**journal)
            log.info("going on with %s", self.folder)
        elif leftovers:
            log.warning("%s is the draft of another request or damaged: starting anew", self.folder)
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> "StagingDir":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), self._lock):
            file.close()
        if not any(self.data_dir.glob("*")):  # nothing to go on from
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end of one of the growing files."""
        if name not in self._files:
            path = self.folder / name
            path.touch()
            file = self._files[name] = path.open("r+b", buffering=0)
            file.truncate(self.journal.sizes.setdefault(name, 0))
            file.seek(0, os.SEEK_END)
        view = memoryview(data)
        self.journal.sizes[name] += len(view)
        while view:
            view = view[self._files[name].write(view) :]

    def read_digests(self, split: str) -> bytes:
        """The hashes that the draft remembers of a split, one after the other."""
        size = self.journal.sizes.get(f"{split}.digests", 0)
        return (self.folder / f"{split}.digests").read_bytes()[:size] if size else b""

    def save(self, *, now: bool = False) -> None:
        """Bring the files, then the journal, to the disk, if it is time for it."""
        if not now and time.monotonic() < self._saved_at + JOURNAL_INTERVAL_SECONDS:
            return
        self._sync_files()
        write_json(self.folder / "journal.json", dataclasses.asdict(self.journal))
        self._saved_at = time.monotonic()

    def publish(self, out: Path) -> None:
        """Make `data` of the draft appear whole at `out`, and remove the rest."""
        self._sync_files()
        fsync_dir(self.data_dir)
        self.__exit__()  # Windows moves and removes no open files
        if out.exists():
            out.rmdir()  # empty, or this fails
        self.data_dir.rename(out)
        fsync_dir(out.parent)
        shutil.rmtree(self.folder)

    def _sync_files(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())


def acquire_lock(folder: Path) -> BinaryIO:
    """Keeps a second `prepare` out of the folder until the returned file is closed or the process ends."""
    file = (folder / "lock").open("wb")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: its own sharing rules keep the growing files from being opened twice
        pass
    except OSError:
        file.close()
        raise UserError(f"{folder} is in use by another prepare; wait for it or choose another --out") from None
    return file


def read_json(path: Path) -> Any:
    """The value in a JSON file; None when there is none or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temp_path = path.with_name(path.name + ".new")
    with temp_path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temp_path.replace(path)


def fsync_dir(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
