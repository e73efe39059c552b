"""A folder that a training, a sweep or a preparation writes is locked: a second one is told which process has it."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinystories import checkpoint
from tinystories.config import Config
from tinystories.data.prepare import prepare
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.files import acquire_lock, hold_lock, release_lock
from tinystories.sweep.runner import run_sweep
from tinystories.train.run import LOCK, train

fcntl = pytest.importorskip("fcntl")

HOLDER = """
import sys
from pathlib import Path
from tinystories.files import acquire_lock
held = acquire_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """Let another process hold a lock; yield its id. It is killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_second_training_names_the_first(config: Config, tmp_path: Path) -> None:
    """The reported case: both wrote metrics.jsonl, and one of them died."""
    run = tmp_path / "run"
    with held_elsewhere(run / LOCK) as pid:
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"run is in use by another train \(pid {pid}\); wait for it"):
                train(config, run, resume=resume)
        assert os.listdir(run) == [LOCK]
    assert (run / LOCK).exists(), "a kill leaves the file, but not the lock"
    assert train(config, run) is not None
    assert not (run / LOCK).exists()


def test_reading_a_run_that_is_being_trained_is_not_blocked(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    with held_elsewhere(run / LOCK):
        assert checkpoint.read_model(run).provenance["step"] == 4
        with pytest.raises(UserError, match="in use by another train"):
            train(config, run, resume=True)


def test_a_second_sweep_names_the_first(tmp_path: Path) -> None:
    with (
        held_elsewhere(tmp_path / "sweep" / ".lock") as pid,
        pytest.raises(UserError, match=rf"sweep is in use by another sweep \(pid {pid}\)"),
    ):
        run_sweep(tmp_path / "sweep", None, None, 1)  # type: ignore[arg-type]


def test_a_second_preparation_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"A cat sat.{END}A dog ran.{END}")
    with (
        held_elsewhere(tmp_path / "out.draft" / "lock") as pid,
        pytest.raises(UserError, match=rf"out\.draft is in use by another prepare \(pid {pid}\)"),
    ):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_failed_start_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data"):
        train(Config(model=config.model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lock_that_is_removed_while_it_is_opened_is_not_held_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process removes the file between the second one's open and its lock."""
    path = tmp_path / "folder" / "lock"
    first = acquire_lock(path)
    assert first is not None
    plain, opened = Path.open, []

    def open_and_release(self: Path, *args: object, **kwargs: object) -> object:
        file = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        if not opened:
            opened.append(file)
            release_lock(first)
            path.parent.rmdir()
        return file

    monkeypatch.setattr(Path, "open", open_and_release)
    second = acquire_lock(path)
    assert second is not None
    assert acquire_lock(path) is None
    release_lock(second)
    assert opened[0].closed


def test_a_file_system_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_lock(tmp_path / "run" / "lock", "train"):
        assert (tmp_path / "run" / "lock").read_text() == str(os.getpid())
    assert not (tmp_path / "run").exists()


def test_the_holder_is_left_out_if_it_is_unknown(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "lock"):
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match="in use by another train; wait"), hold_lock(tmp_path / "lock", "train"):
            pass


class FakeMsvcrt:
    """`msvcrt` as Windows has it: a locked byte belongs to the open file that locked it, until that is closed."""

    LK_NBLCK = 2

    def __init__(self, refusal: int = errno.EACCES) -> None:
        self.refusal = refusal
        self.holders: dict[int, int] = {}  # inode: file descriptor
        self.offsets: list[int] = []

    def locking(self, descriptor: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (self.LK_NBLCK, 1)
        self.offsets.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        inode = os.fstat(descriptor).st_ino
        holder = self.holders.get(inode, descriptor)
        if holder != descriptor and is_open(holder, inode):
            raise OSError(self.refusal, os.strerror(self.refusal))
        self.holders[inode] = descriptor


def is_open(descriptor: int, inode: int) -> bool:
    """Whether a file descriptor is still that of a file."""
    try:
        return os.fstat(descriptor).st_ino == inode
    except OSError:
        return False


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> FakeMsvcrt:
    fake = FakeMsvcrt()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)  # type: ignore[arg-type]
    return fake


def test_a_lock_on_windows(windows: FakeMsvcrt, tmp_path: Path) -> None:
    """The reported case: nothing was locked."""
    path = tmp_path / "run" / "lock"
    with hold_lock(path, "train"):
        with (
            pytest.raises(UserError, match=rf"in use by another train \(pid {os.getpid()}\)"),
            hold_lock(path, "train"),
        ):
            pass
        assert path.read_text() == str(os.getpid()), "the others can read it: it is not what is locked"
        assert min(windows.offsets) > 1000
    assert not path.exists()
    with hold_lock(path, "train"):
        pass


def test_a_preparation_on_windows(windows: FakeMsvcrt, tmp_path: Path) -> None:
    """A relative: the lock of a staging directory stays when it is left."""
    assert not windows.holders
    (tmp_path / "a.txt").write_text(f"A cat sat.{END}A dog ran.{END}")
    held = acquire_lock(tmp_path / "out.draft" / "lock")
    assert held is not None
    with pytest.raises(UserError, match=r"out\.draft is in use by another prepare"):
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    held.close()
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EDEADLK])
def test_how_windows_says_that_a_file_is_locked(windows: FakeMsvcrt, tmp_path: Path, number: int) -> None:
    """A relative: one of them is the answer of the C library, the other that of some file systems."""
    windows.refusal = number
    held = acquire_lock(tmp_path / "lock")
    assert held is not None
    assert acquire_lock(tmp_path / "lock") is None
    held.close()


def test_a_file_system_without_locks_on_windows(windows: FakeMsvcrt, tmp_path: Path) -> None:
    windows.refusal = errno.EINVAL
    first, second = acquire_lock(tmp_path / "lock"), acquire_lock(tmp_path / "lock")
    assert first is not None
    assert second is not None
    first.close()
    second.close()
