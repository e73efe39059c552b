"""A folder that a training, a sweep or a preparation writes is locked: a second one is told which process has it."""

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

pytest.importorskip("fcntl")

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
    import fcntl

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
