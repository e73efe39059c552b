"""Files on disk: atomic writes, JSON, checksums, locks, and one-line messages for what the disk refuses.

Whatever is written atomically is complete or unchanged after an exception, a kill or, if it is synced, a power failure.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from tinystories.errors import UserError

TEMP_SUFFIX = ".draft"  # of unfinished directories, and of files on their way into a run directory
MAX_JSON_BYTES = 64_000_000  # real files have a few thousand
MAX_JSON_DEPTH = 50  # real files: about 5
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file too large
# What a disk, a path or a limit of the system can refuse, whatever the program does right.
DISK_ERRNOS = {*DISK_FULL_ERRNOS, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EIO, errno.ELOOP}
DISK_ERRNOS |= {errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ESTALE}
LOCK_ATTEMPTS = 100  # each fails only if another process removes the lock at that moment
WINDOWS_LOCK_BYTE = 1 << 30  # far behind the id that a lock file holds
# How libraries quote the system: "... I/O error: No space left on device (os error 28)", "... (disk I/O error)".
LIBRARY_ERROR = re.compile(r"(?:I/O error: )?([^:]*) \(os error \d+\)")


@contextlib.contextmanager
def os_errors(where: object) -> Iterator[None]:
    """Turn an `OSError` raised inside the block into a `UserError` that names `where`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def write_errors(where: object) -> Iterator[None]:
    """Turn what the disk refuses inside the block (full, no permission) into a `UserError` that names `where`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} cannot be written: {error_reason(error)}") from None


def describe_write_error(error: OSError, where: object) -> str:
    """Return the message for a failed write; `where` is named if the error does not name a file."""
    return f"{error.filename or where} cannot be written: {error_reason(error)}"


def append_text(file: FileIO, text: str, path: Path, advice: str) -> None:
    """Write text to an unbuffered file, which may take it in parts. `UserError` with `advice` if that fails."""
    data = memoryview(text.encode())
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise UserError(f"{describe_write_error(error, path)}; {advice}") from None


def describe_disk_error(error: BaseException) -> str | None:
    """Return one line for what a disk or a path refused, in any command; None if the error is something else.

    Writers say more by `write_errors`. This is for the rest: a temporary file, a cache, a library's own files.
    """
    if isinstance(error, OSError):
        return describe_write_error(error, "the output") if error.errno in DISK_ERRNOS else None
    is_library_error = type(error).__module__.split(".")[0] in ("safetensors", "pyarrow", "sqlalchemy", "sqlite3")
    if is_library_error and LIBRARY_ERROR.search(str(error)):
        return f"a file cannot be written: {error_reason(error)}"
    return None


def error_reason(error: BaseException) -> str:
    """Return why a file could not be read or written, in one line: the words of the system if the error has them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    match = LIBRARY_ERROR.search(text)
    return match[1] if match else text or type(error).__name__


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


def read_json_object(path: Path) -> dict[str, Any]:
    """Read an untrusted file that holds a JSON object.

    `UserError` if it is too large, malformed or cannot be read, but FileNotFoundError if there is none.
    """
    try:
        value = json.loads(read_limited(path, MAX_JSON_BYTES).decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    if is_nested_deeper(value, MAX_JSON_DEPTH):  # what reads or shows the values is recursive
        raise UserError(f"{path} has lists or objects nested more than {MAX_JSON_DEPTH} deep")
    return value


def is_nested_deeper(value: object, depth: int) -> bool:
    """Return whether lists and dicts are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented by two spaces."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex. `UserError` if it cannot be read."""
    with os_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file atomically and sync it to disk. Text becomes UTF-8, with its line ends as they are."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(
    path: Path, *, concurrent: bool = False, private: bool = False, sync: bool = True
) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` when the block succeeds, and is removed when it fails.

    With `concurrent`, several processes may write `path` at once; without it, the temporary file has a fixed name, so
    the next write replaces what a killed process left. `private`: only the owner may read it. `sync` the file before
    the rename and the folder after it; needless for a cache that is verified when it is read.
    """
    temp_name = f".{path.name}.{os.urandom(4).hex()}" if concurrent else f"{path.name}.new"
    temp_path = path.with_name(temp_name)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if concurrent else os.O_TRUNC) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temp_path, flags, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temp_path, path)
    except BaseException:
        temp_path.unlink(missing_ok=True)
        raise
    if sync:
        fsync(path.parent)


@contextlib.contextmanager
def atomic_directory(target: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield a staging folder that is renamed to `target` when the block succeeds, and removed when it fails.

    Everything is synced to disk before the rename. An existing `target` is replaced. By default the staging folder is
    created in a hidden folder next to `target`; a given `staging` path is reserved for it, so leftovers of a killed
    process are removed first.
    """
    require_name(target)
    with contextlib.ExitStack() as stack:
        if staging is None:
            staging = stack.enter_context(temp_sibling(target)) / target.name
        else:
            shutil.rmtree(staging, ignore_errors=True)
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in (*staging.rglob("*"), staging):
            fsync(path)
        atomic_replace(staging, target)
        fsync(target.parent)


def require_name(path: Path) -> None:
    """`UserError` if an output path has no name of its own ("", "..")."""
    if path.name in ("", ".."):
        raise UserError(f"{path} is not a valid output path; use a path such as {path / 'stories'}")


@contextlib.contextmanager
def temp_sibling(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder in the same directory, for staging; remove it afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=TEMP_SUFFIX, dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def atomic_replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`. An existing target directory is removed on success and restored on failure.

    If it cannot be restored either, it stays in a hidden folder next to `target`.
    """
    if not target.is_dir():
        os.replace(source, target)
        return
    backup_dir = Path(tempfile.mkdtemp(prefix=".", suffix=TEMP_SUFFIX, dir=target.parent))
    try:
        os.replace(target, backup_dir / target.name)
        try:
            os.replace(source, target)
        except BaseException:
            os.replace(backup_dir / target.name, target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(backup_dir, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or directory to disk (a no-op for directories on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_lock(path: Path, command: str) -> Iterator[None]:
    """Hold the lock `path` inside the block, creating its folder if needed, and remove it afterwards.

    `UserError` if another process holds it; `command` is what that process must be ("train"). The folder is removed too
    if it was created here and nothing else is in it.
    """
    folder = path.parent
    is_new = not folder.exists()
    file = acquire_lock(path)
    if file is None:
        raise UserError(in_use_message(path, command))
    try:
        yield
    finally:
        release_lock(file)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def acquire_lock(path: Path) -> BinaryIO | None:
    """Create and lock a file until `release_lock` or the end of the process, however it ends; write its id into it.

    None if another process holds the lock. On file systems without locks nothing is locked. OSError if the file cannot
    be created.
    """
    for attempts_left in range(LOCK_ATTEMPTS)[::-1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        try:
            file = path.open("ab", buffering=0)
        except FileNotFoundError:  # the holder has just removed the folder
            if attempts_left:
                continue
            raise
        if not lock_file(file):
            file.close()
            return None
        if is_same_file(file, path) or not attempts_left:
            break
        file.close()  # its earlier holder has removed it since it was opened: what is locked has no name
    with contextlib.suppress(OSError):  # a full disk: the lock works without the id
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def lock_file(file: BinaryIO) -> bool:
    """Lock an open file until it is closed, without waiting. False if another process holds the lock.

    On Windows, which has no flock, a byte is locked that the file does not have: the others cannot read a locked one.
    """
    try:
        import fcntl
    except ImportError:
        msvcrt: Any = importlib.import_module("msvcrt")
        file.seek(WINDOWS_LOCK_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EDEADLK)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def release_lock(file: BinaryIO) -> None:
    """Remove and unlock a file that `acquire_lock` returned; it may have been removed already."""
    if os.name == "nt":  # which cannot remove an open file
        file.close()
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


def in_use_message(path: Path, command: str) -> str:
    """Return the message for a lock that another process holds, with its id if that can be read."""
    try:
        digits = read_limited(path, 100).decode("ascii", "replace")
    except (OSError, UserError):
        digits = ""
    holder = f"{command} (pid {digits})" if digits.isdigit() else command
    return f"{path.parent} is in use by another {holder}; wait for it or choose another --out"


def is_same_file(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is the one that now has the name `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
