"""The unfinished output of `prepare`: append-only files, and a journal that records how much of each is valid.

A run killed at any moment, even by power loss, can resume from the journal: data is fsynced before the journal that
covers it, and anything in a file beyond the size in the journal is truncated. The journal has hashes of itself and of
what it covers: if any of that was damaged, the run starts over.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from tinystories.data.dataset import SPLITS
from tinystories.errors import UserError
from tinystories.files import acquire_lock, fsync, in_use_message, read_json_object, sha256, write_atomic, write_json

log = logging.getLogger(__name__)

STAGING_NAMES = {"lock", "request.json", "journal.json", *(f"{split}.digests" for split in SPLITS)}
JOURNAL_INTERVAL_SECONDS = 1.0  # a kill loses at most this much work, plus the current batch


@dataclasses.dataclass(kw_only=True, slots=True)
class Journal:
    """The state needed to resume."""

    revisions: list[str] = dataclasses.field(default_factory=list)  # commits of the source and the validation source
    stage: int = 0  # index of the source being read
    position: Any = None  # where to resume in that source
    read: int = 0  # bytes consumed from all sources so far
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # valid bytes of each append-only file
    text_bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # UTF-8 bytes of the stories in each split
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # dropped stories, by reason
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)  # XXH3-128 of these bytes
    tokenizer_sha256: str = ""  # of data/tokenizer.json


class StagingDir:
    """A locked staging directory, used as a context manager. Unless published, it is kept for resuming."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        """Open or create the directory: resume if it belongs to the request `spec`, otherwise clear it.

        Raises `UserError` if it exists but is not a staging directory, or if another `prepare` is using it.
        """
        self.folder = folder
        self.data_dir = folder / "data"  # what is published; the rest is only needed to resume
        self.journal = Journal()
        self._files: dict[str, BinaryIO] = {}
        self._hashers: dict[str, xxhash.xxh3_128] = {}
        if not is_own_folder(folder):
            raise UserError(
                f"{folder} exists but is not a staging directory of prepare; remove it or choose another --out"
            )
        lock = acquire_lock(folder / "lock")
        if lock is None:
            raise UserError(in_use_message(folder / "lock", "prepare"))
        self._lock = lock
        try:
            self._resume(spec)
            self.data_dir.mkdir(exist_ok=True)
            write_json(folder / "request.json", spec)
        except BaseException:
            self.__exit__()
            raise
        self._saved_at = time.monotonic()

    def _resume(self, spec: dict[str, Any]) -> None:
        """Load the journal if the request is the same and the files are those it describes; otherwise start over."""
        is_same_request = read_json(self.folder / "request.json") == spec
        journal = read_journal(self.folder / "journal.json")
        if is_same_request and journal is not None and self._verify(journal):
            self.journal = journal
            log.info("resuming from %s", self.folder)
            return
        leftovers = [path for path in self.folder.iterdir() if path.name != "lock"]
        if leftovers and not (is_same_request and not (self.folder / "journal.json").exists()):  # unless there was none
            log.warning("%s belongs to a different request or is damaged; starting over", self.folder)
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _verify(self, journal: Journal) -> bool:
        """Whether the tokenizer, and the bytes of each append-only file that the journal covers, are as written."""
        tokenizer_path = self.data_dir / "tokenizer.json"
        if not tokenizer_path.is_file() or sha256(tokenizer_path) != journal.tokenizer_sha256:
            return False
        for name, size in journal.sizes.items():
            hasher = self._hashers[name] = xxhash.xxh3_128()
            if not update_from_file(hasher, self.folder / name, size) or hasher.hexdigest() != journal.hashes[name]:
                self._hashers.clear()
                return False
        return True

    def __enter__(self) -> "StagingDir":
        return self

    def __exit__(self, *_: object) -> None:
        """Close and unlock the directory; remove it if there is nothing to resume from, while it is still locked."""
        self._close_files()
        is_empty = not any(self.data_dir.glob("*"))
        if is_empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()  # the file stays: it marks the directory as ours
        if is_empty:
            with contextlib.suppress(OSError):  # Windows could not remove the open lock
                self.folder.rmdir()

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Append to the file `name`, a path relative to the directory.

        The first append of a run truncates the file to the size in the journal.
        """
        if name not in self._files:
            path = self.folder / name
            path.touch()
            file = self._files[name] = path.open("r+b", buffering=0)
            file.truncate(self.journal.sizes.setdefault(name, 0))
            file.seek(0, os.SEEK_END)
        view = memoryview(data)
        self.journal.sizes[name] += len(view)
        self._hashers.setdefault(name, xxhash.xxh3_128()).update(view)
        while view:  # an unbuffered write may be partial
            view = view[self._files[name].write(view) :]

    def write_tokenizer(self, json_text: str) -> None:
        """Write the tokenizer of the run, and the journal that names its hash."""
        path = self.data_dir / "tokenizer.json"
        write_atomic(path, json_text)
        self.journal.tokenizer_sha256 = sha256(path)
        self.save(now=True)

    def read_digests(self, split: str) -> bytes:
        """Return the concatenated hashes stored for a split, 16 bytes each."""
        size = self.journal.sizes.get(f"{split}.digests", 0)
        return (self.folder / f"{split}.digests").read_bytes()[:size] if size else b""

    def save(self, *, now: bool = False) -> None:
        """Fsync the files, then write the journal; without `now`, at most once per JOURNAL_INTERVAL_SECONDS."""
        if not now and time.monotonic() < self._saved_at + JOURNAL_INTERVAL_SECONDS:
            return
        self._sync_files()
        self.journal.hashes = {name: hasher.hexdigest() for name, hasher in self._hashers.items()}
        record = dataclasses.asdict(self.journal)
        write_json(self.folder / "journal.json", record | {"hash": hash_record(record)})
        self._saved_at = time.monotonic()

    def publish(self, out: Path) -> None:
        """Move the `data` folder to `out` with one rename and remove the staging directory."""
        self._sync_files()
        fsync(self.data_dir)
        self._close_files()  # Windows cannot move open files
        if out.exists():
            out.rmdir()  # fails unless it is empty
        self.data_dir.rename(out)
        fsync(out.parent)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    def _sync_files(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())


def is_own_folder(folder: Path) -> bool:
    """Whether a folder is missing, or a staging directory; it may be incomplete, after a kill while it was removed."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return bool(names & {"request.json", "lock"}) or names <= STAGING_NAMES


def read_journal(path: Path) -> Journal | None:
    """Return a journal, or None if it is missing or damaged, or written by a version without hashes."""
    record = read_json(path) or {}
    recorded_hash = record.pop("hash", None)
    return Journal(**record) if recorded_hash == hash_record(record) else None


def hash_record(record: dict[str, Any]) -> str:
    """Return a hash of a JSON object that does not depend on the order of its fields."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def update_from_file(hasher: xxhash.xxh3_128, path: Path, size: int) -> bool:
    """Update a hasher with the first `size` bytes of a file; return whether it has them."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        while size and (data := file.read(min(size, 1 << 20))):
            hasher.update(data)
            size -= len(data)
    return size == 0


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is missing or invalid."""
    try:
        return read_json_object(path)
    except (FileNotFoundError, UserError):
        return None
