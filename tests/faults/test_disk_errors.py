"""What a disk refuses is one line and exit code 2, at every writer: full, read-only, a quota, a name too long."""

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import SafetensorError

from tinystories import checkpoint, files
from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config import Config
from tinystories.data.prepare import prepare
from tinystories.errors import UserError
from tinystories.files import atomic_replace, describe_disk_error, error_reason
from tinystories.generate.batching import Story
from tinystories.generate.output import StoryWriter, check_output_path
from tinystories.sweep import study
from tinystories.train import state
from tinystories.train.recording.metrics import Metrics
from tinystories.train.recording.side_work import SideWork
from tinystories.train.run import train

LONG = "x" * 300
REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EIO]
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def refuse(number: int, filename: str | None = None) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), filename)

    return fail


def output_of(command: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return run(click.command()(command), []), capsys.readouterr().err


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("filename", [None, "some/file"])
def test_any_command_ends_in_one_line(number: int, filename: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = output_of(lambda: refuse(number, filename)(), capsys)
    assert (code, text) == (2, f"error: {filename or 'the output'} cannot be written: {os.strerror(number)}\n")


def test_errors_of_libraries_are_recognized_by_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    def save() -> None:
        raise SafetensorError(FULL)

    assert output_of(save, capsys) == (2, "error: a file cannot be written: No space left on device\n")
    assert describe_disk_error(SafetensorError("invalid header")) is None
    assert describe_disk_error(FileNotFoundError(2, "No such file or directory")) is None
    assert error_reason(SafetensorError(f'{FULL} at path "/a"')) == "No space left on device"
    assert error_reason(OSError("two\nlines")) == "two lines"
    assert error_reason(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "sample", "--tokenizer", "bpe:300", "--out", LONG],
        ["train", "--data", "DATA", "--out", LONG],
        ["train", "--data", LONG, "--out", "run"],
        ["train", "--data", "DATA", "--out", LONG, "--resume"],
        ["train", "--config", LONG],
        ["sweep", "--data", "DATA", "--out", LONG, "--optim.learning_rate", "1e-3,1e-2"],
        ["sweep", "--show", "--out", LONG],
        ["quantize", "BUNDLED", "--out", LONG],
        ["generate", "--out", f"{LONG}.txt", "--max-tokens", "1"],
        ["generate", "--out", f"{LONG}/a.txt", "--max-tokens", "1"],
        ["generate", LONG],
        ["eval", "--data", LONG],
        ["info", LONG],
        ["export", "--format", "gguf", "--out", LONG],
        ["import", LONG, "--out", "model"],
        ["import", "BUNDLED", "--out", LONG],
        ["fetch", "story", "--out", LONG],
    ],
    ids=lambda words: " ".join("LONG" if LONG in word else word for word in words),
)
def test_names_that_are_too_long(
    words: list[str], sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The reported case is the first; all commands that take a path are its relatives."""
    monkeypatch.chdir(tmp_path)
    names = {"DATA": str(sample_data), "BUNDLED": str(checkpoint.BUNDLED_MODEL)}
    assert run(cli, [names.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in captured.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", REFUSALS)
def test_a_checkpoint_that_cannot_be_written(
    number: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_config", refuse(number))
    with pytest.raises(UserError, match=rf"could not be written \({os.strerror(number)}\); earlier checkpoints"):
        train(config, tmp_path / "run")


def test_a_checkpoint_on_a_full_disk(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported case: safetensors has an error of its own."""

    def save(*_: object, **__: object) -> None:
        raise SafetensorError(FULL)

    monkeypatch.setattr(state, "save_file", save)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\); earlier checkpoints"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True) is not None


@pytest.mark.parametrize("name", ["publish", "list_checkpoints"])
def test_a_run_directory_that_may_not_be_written(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reported case, and a checkpoint that may not be removed."""
    train(config, tmp_path / "run")
    if name == "publish":
        monkeypatch.setattr(checkpoint, name, refuse(errno.EACCES))
        with pytest.raises(UserError, match=r"--out \S+run cannot be written: Permission denied"):
            train(config, tmp_path / "run", resume=True)
    else:
        monkeypatch.setattr(state.shutil, "rmtree", refuse(errno.EROFS))
        with pytest.raises(UserError, match="checkpoints cannot be written: Read-only file system"):
            state.prune_checkpoints(tmp_path / "run", best_step=-1, keep=1)


def test_settings_are_replaced_atomically(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_bytes()
    monkeypatch.setattr(files.os, "replace", refuse(errno.ENOSPC))
    monkeypatch.setattr(checkpoint, "publish", lambda *_: None)
    with pytest.raises(UserError, match="No space left on device"):
        train(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


class FullFile:
    """A file that has room for three bytes."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: memoryview) -> int:
        if len(self.written) == 3:
            refuse(errno.ENOSPC)()
        self.written += bytes(data[:1])
        return 1

    def close(self) -> None:
        pass


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, SideWork())
    metrics.file.close()
    metrics.file = full = FullFile()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left on device; free some"):
        metrics.write({"step": 1})
    assert full.written == b'{"s'
    metrics.close()


def test_stories_on_a_full_disk(tmp_path: Path) -> None:
    story = Story(
        prompt="A", continuation=" cat.", ids=(5,), stop_reason="end", n_prompt=1, seed=0, number=0, seconds=1
    )
    with StoryWriter(tmp_path / "a.txt") as writer:
        writer.write(story)
        writer.file.close()
        writer.file = FullFile()  # type: ignore[assignment]
        with pytest.raises(UserError, match=r"a\.txt cannot be written: No space left on device; the stories before"):
            writer.write(story)
    assert (tmp_path / "a.txt").read_text() == "A cat.\n<|endoftext|>\n"
    with pytest.raises(UserError, match="File name too long"):
        check_output_path(Path(LONG) / "a.txt")


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("attempt to write a readonly database"),
        sqlite3.DatabaseError("database disk image is malformed"),
    ],
    ids=str,
)
def test_the_database_of_a_sweep(error: sqlite3.Error, tmp_path: Path) -> None:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    wrapped = OperationalError("INSERT INTO trials", {}, error)
    internal = StorageInternalError("An exception is raised during the commit.")
    internal.__cause__ = wrapped
    for raised in (error, wrapped, internal):
        with pytest.raises(UserError) as caught, study.database_errors(tmp_path):
            raise raised
        assert str(caught.value) == f"{tmp_path}/sweep.db cannot be used: {error}"
    with pytest.raises(RuntimeError, match="a bug"), study.database_errors(tmp_path):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("place", ["write_json", "acquire_lock"])
def test_a_preparation_that_cannot_begin_leaves_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinystories.data import staging

    (tmp_path / "a.txt").write_text("A cat sat.<|endoftext|>A dog ran.<|endoftext|>")
    with monkeypatch.context() as patch:
        patch.setattr(staging, place, refuse(errno.ENOSPC))
        with pytest.raises(UserError, match="the disk is full"):
            prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    assert os.listdir(tmp_path) == ["a.txt"]
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


def test_a_directory_that_cannot_be_restored_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the second rename, and then also the one that would undo the first."""
    source, target = tmp_path / "new", tmp_path / "model"
    for folder in (source, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    plain, calls = os.replace, []

    def replace(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) > 1:
            refuse(errno.EIO)()
        plain(old, new)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        atomic_replace(source, target)
    assert len(calls) == 3
    (kept,) = tmp_path.glob(".*/model/name")
    assert kept.read_text() == "model"
