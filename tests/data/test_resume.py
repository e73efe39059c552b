"""Interrupted at any moment and run again, `prepare` gives the same bytes as a straight run."""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from story_files import put, write_csv, write_jsonl, write_parquet, write_txt

from tinystories.data import staging
from tinystories.data.prepare import prepare
from tinystories.data.source import reader
from tinystories.data.staging import StagingDir
from tinystories.errors import UserError

pytestmark = pytest.mark.extended

CHILD = """
import json, os, signal, sys
from tinystories import files
from tinystories.data import staging
from tinystories.data.source import reader
from tinystories.data.prepare import prepare

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run as a background job
reader.BATCH_BYTES, staging.JOURNAL_INTERVAL_SECONDS, os.fsync = 500, 0.0, lambda _: None
{fault}
prepare(sys.argv[1], sys.argv[2], tokenizer="bpe:300", val_fraction=0.2, progress=False)
"""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", 500)
    monkeypatch.setattr(staging, "JOURNAL_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here simulates a power failure


@pytest.fixture
def source(tmp_path: Path, many: list[str]) -> Path:
    twice = many + many[:40]
    random.Random(2).shuffle(twice)
    return write_txt(tmp_path / "source.txt", twice)


def run(source: Path, out: Path, val: Path | None = None) -> None:
    prepare(source, out, val=val, tokenizer="bpe:300", val_fraction=0.2, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def child(source: Path, out: Path, fault: str) -> int:
    """Run `prepare` in a subprocess with the code `fault` injected; return its exit code."""
    code = CHILD.format(fault=fault)
    return subprocess.run([sys.executable, "-c", code, str(source), str(out)], capture_output=True).returncode


def failing(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException, *, half: bool = False) -> None:
    """Make call number `call` of a `StagingDir` method fail; with `half`, after half of an append's data."""
    right: Callable[..., None] = getattr(StagingDir, name)
    calls = iter(range(10**9))

    def method(self: StagingDir, *args: object, **options: object) -> None:
        if next(calls) == call:
            if half:
                right(self, args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[arg-type]
            raise error
        right(self, *args, **options)

    monkeypatch.setattr(StagingDir, name, method)


@pytest.mark.parametrize("half", [False, True])
def test_a_run_stopped_at_any_write_resumes_to_the_same_bytes(
    half: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    for call in range(0, 200, 13):
        out = tmp_path / f"out{call}"
        with monkeypatch.context() as patch:
            failing(patch, "append", call, RuntimeError("stop"), half=half)
            with pytest.raises(RuntimeError, match="stop"):
                run(source, out)
        assert not out.exists()
        run(source, out)
        assert contents(out) == expected
        assert not out.with_name(out.name + ".draft").exists()


@pytest.mark.parametrize("name", ["save", "publish"])
def test_a_run_stopped_at_the_journal_or_at_publishing_resumes(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "straight")
    with monkeypatch.context() as patch:
        failing(patch, name, 9 if name == "save" else 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_csv, write_parquet])
def test_finished_work_is_not_repeated_on_resuming(
    write: Callable[[Path, list[str]], Path],
    tmp_path: Path,
    many: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    suffix = write.__name__.removeprefix("write_")
    source, val = write(tmp_path / f"a.{suffix}", many), write(tmp_path / f"val.{suffix}", many[:30])
    run(source, tmp_path / "straight", val)
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        failing(patch, "save", 20, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            run(source, tmp_path / "out", val)
    journal = json.loads((tmp_path / "out.draft" / "journal.json").read_text())
    assert journal["stage"] == 1
    assert journal["read"] > 0
    read: list[int] = []
    right = StagingDir.save

    def save(self: StagingDir, **options: bool) -> None:
        read.append(self.journal.read)
        right(self, **options)

    monkeypatch.setattr(StagingDir, "save", save)
    run(source, tmp_path / "out", val)
    assert min(read) > journal["read"]
    assert "resuming" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


KILLS = {
    "in the middle of a write": """
right, calls = staging.StagingDir.append, iter(range(10**9))
def append(self, name, data):
    if next(calls) == 40:
        right(self, name, data[: len(data) // 2])
        os.kill(os.getpid(), signal.{signal})
        data = data[len(data) // 2 :]  # the writer thread survives Ctrl-C
    right(self, name, data)
staging.StagingDir.append = append
""",
    "before the journal is in place": """
right, calls = files.write_atomic, iter(range(10**9))
def write_whole(path, text):
    if next(calls) == 12:
        path.with_name(path.name + ".new").write_text(text[:9])
        os.kill(os.getpid(), signal.{signal})
    right(path, text)
files.write_atomic = write_whole
""",
    "before the result is in place": """
def sync(folder):
    os.kill(os.getpid(), signal.{signal})
staging.fsync = sync
""",
}


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_run_resumes_to_the_same_bytes(name: str, moment: str, source: Path, tmp_path: Path) -> None:
    code = child(source, tmp_path / "out", KILLS[moment].format(signal=name))
    assert code == -getattr(signal, name)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.draft" / "request.json").exists()
    run(source, tmp_path / "out")
    run(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert not (tmp_path / "out.draft").exists()


@pytest.fixture
def stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The staging directory of a run that was stopped half-way."""
    with monkeypatch.context() as patch:
        failing(patch, "save", 12, RuntimeError("stop"))
        with pytest.raises(RuntimeError, match="stop"):
            run(source, tmp_path / "out")
    return tmp_path / "out.draft"


@pytest.mark.parametrize("damage", ["journal.json", "request.json", "data/train.bin", "train.digests", "data/val.idx"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_draft_is_started_anew(
    damage: str, missing: bool, stopped: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / damage
    if missing:
        path.unlink()
    else:
        put(path, path.read_bytes()[:7])
    run(source, tmp_path / "out")
    run(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert "journal" in damage or "starting over" in caplog.text


def test_the_draft_of_another_request_is_started_anew(
    stopped: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(source, tmp_path / "out", tokenizer="bpe:310", progress=False)
    prepare(source, tmp_path / "straight", tokenizer="bpe:310", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert f"{stopped} belongs to a different request" in caplog.text


def test_a_changed_source_is_not_mixed_with_its_draft(
    stopped: Path, source: Path, tmp_path: Path, many: list[str]
) -> None:
    assert stopped.exists()
    write_txt(source, many[::-1])
    run(source, tmp_path / "out")
    run(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("call", [0, 1, 50])
def test_a_full_disk_is_named_and_the_rest_goes_on(
    call: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "append", call, OSError(errno.ENOSPC, "No space left on device"), half=True)
        with pytest.raises(UserError, match=r"out\.draft: the disk is full; about 1 MB") as caught:
            run(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    run(source, tmp_path / "out")
    run(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_limit_of_the_system_on_file_sizes_is_a_full_disk(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    code = CHILD.format(fault="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))")
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the disk is full" in done.stderr.splitlines()[-1]
