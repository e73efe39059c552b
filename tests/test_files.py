"""What is written atomically is complete or unchanged, leaves nothing behind, and is on disk before its rename."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinystories import files
from tinystories.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "notes").write_bytes(b"old")
    return tmp_path / "notes"


def names(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir())


def test_text_and_bytes_are_written_as_they_are(path: Path) -> None:
    files.write_atomic(path, "one\r\ntwo\nthr\u00e9\u00e9")
    assert path.read_bytes() == b"one\r\ntwo\nthr\xc3\xa9\xc3\xa9"
    files.write_atomic(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    files.write_json(path, {"a": [1, "\u00e9"]})
    assert path.read_bytes() == b'{\n  "a": [\n    1,\n    "\\u00e9"\n  ]\n}\n'
    assert files.read_json_object(path) == {"a": [1, "\u00e9"]}
    assert names(path) == ["notes"]


@pytest.mark.parametrize("concurrent", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_exception_half_way_keeps_the_old_file_and_leaves_no_trace(
    path: Path, concurrent: bool, error: BaseException
) -> None:
    def write() -> None:
        with files.atomic_file(path, concurrent=concurrent) as file:
            file.write(b"half")
            file.flush()
            assert len(names(path)) == 2
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert names(path) == ["notes"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("new", [False, True])
def test_a_write_that_the_disk_refuses_leaves_no_trace(
    path: Path, call: str, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if new:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            files.write_json(path, {"a": 1})
    assert names(path) == ([] if new else ["notes"])
    assert new or path.read_bytes() == b"old"


def test_a_real_limit_on_file_sizes_leaves_no_trace(path: Path) -> None:
    pytest.importorskip("resource")
    program = (
        "import resource, signal, sys; from pathlib import Path; from tinystories import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: files.write_atomic(Path(sys.argv[1]), b'x' * 9000)\n"
        "except OSError as error: print(error.errno in files.DISK_FULL_ERRNOS)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert path.read_bytes() == b"old"
    assert names(path) == ["notes"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomic(tmp_path / "none" / "notes", b"new")
    assert str(tmp_path / "none") in files.describe_write_error(caught.value, "the output")
    assert files.describe_write_error(OSError(errno.ENOSPC, "full"), "it") == "it cannot be written: full"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["half-way", "fsync", "replace"])
def test_a_kill_keeps_the_old_file_and_the_next_write_clears_up(path: Path, moment: str) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
from tinystories import files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} != "half-way": setattr(os, {moment!r}, die)
with files.atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half" * 99)
    file.flush()
    if {moment!r} == "half-way": die()
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert names(path) == ["notes", "notes.new"]
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path) == ["notes"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of os.fsync and os.replace, in order, with the name of their file."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files come from /proc")
    calls: list[str] = []

    def record(name: str, describe: Callable[..., str]) -> None:
        right = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (calls.append(f"{name} {describe(*args)}"), right(*args))[1])

    record("fsync", lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    record("replace", lambda old, _: Path(old).name)
    return calls


def test_a_file_is_synced_before_its_rename_and_its_folder_after(path: Path, calls: list[str]) -> None:
    files.write_atomic(path, b"new")
    assert calls == ["fsync notes.new", "replace notes.new", f"fsync {path.parent.name}"]
    calls.clear()
    with files.atomic_file(path, sync=False) as file:
        file.write(b"newer")
    assert calls == ["replace notes.new"]


def test_a_directory_is_synced_before_its_rename(tmp_path: Path, calls: list[str]) -> None:
    with files.atomic_directory(tmp_path / "model") as folder:
        (folder / "state").mkdir()
        (folder / "state" / "clock").write_bytes(b"1")
    assert sorted(calls[:3]) == ["fsync clock", "fsync model", "fsync state"]
    assert calls[3:] == ["replace model", f"fsync {tmp_path.name}"]


@pytest.mark.skipif(os.name == "nt", reason="no modes")
@pytest.mark.parametrize("concurrent", [False, True])
def test_a_new_file_has_default_permissions_unless_private(tmp_path: Path, concurrent: bool) -> None:
    (tmp_path / "plain").touch()
    for private in (False, True):
        with files.atomic_file(tmp_path / "new", concurrent=concurrent, private=private) as file:
            file.write(b"")
        expected = 0o600 if private else stat.S_IMODE((tmp_path / "plain").stat().st_mode)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == expected


def test_concurrent_writers_do_not_share_a_temporary_file(path: Path) -> None:
    with files.atomic_file(path, concurrent=True) as one, files.atomic_file(path, concurrent=True) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one"
    assert names(path) == ["notes"]


def test_a_lock_keeps_other_processes_out_and_a_kill_releases_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    lock = tmp_path / "lock"
    program = "import sys; from pathlib import Path; from tinystories import files\n"
    program += "held = files.acquire_lock(Path(sys.argv[1])); print(held is not None, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert files.acquire_lock(lock) is None
        process.kill()
    held = files.acquire_lock(lock)
    assert held is not None
    with held:
        done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"
    again = files.acquire_lock(lock)
    assert again is not None
    again.close()


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '"\ud800"', "{" + " " * 100])
def test_json_that_is_no_object_is_refused(path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100_000)
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"notes (cannot be read|must hold a JSON object)"):
        files.read_json_object(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.read_json_object(path)


def test_reading_is_bounded(path: Path, tmp_path: Path) -> None:
    assert files.read_limited(path, 3) == b"old"
    with pytest.raises(UserError, match="too large"):
        files.read_limited(path, 2)
    with pytest.raises(UserError, match="not a regular file"):
        files.read_limited(tmp_path, 2)
    assert files.sha256(path) == "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4"
    with pytest.raises(UserError, match="none cannot be read"):
        files.sha256(tmp_path / "none")
