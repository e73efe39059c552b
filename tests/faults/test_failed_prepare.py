"""A `prepare` that failed leaves nothing that blocks the next one with the same output."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tinystories.data import prepare as prepare_module
from tinystories.data.prepare import PrepareJob, PrepareReport, prepare
from tinystories.data.staging import StagingDir
from tinystories.data.tokenizer import END
from tinystories.errors import UserError

GOOD = f"A cat sat.{END}A dog ran.{END}".encode()


def run(source: Path, out: Path) -> PrepareReport:
    return prepare(source, out, tokenizer="bpe:300", progress=False)


@pytest.mark.parametrize(
    "bad",
    [
        f"fine{END}".encode() + b"caf\xe9" + END.encode(),
        b"no separator",
        f"  {END} {END}".encode(),
        GOOD.decode().encode("utf-16"),
        b"\x1f\x8b\x08\0damaged",
    ],
    ids=["latin-1", "no separator", "no stories", "utf-16", "damaged"],
)
def test_the_corrected_file_is_prepared(bad: bytes, tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_bytes(bad)
    for _ in range(2):
        with pytest.raises(UserError):
            run(path, out)
    path.write_bytes(GOOD)
    assert run(path, out).meta.splits["train"].stories == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "out"]


def test_another_source_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"x" + END.encode() + b"\xff" + END.encode())
    (tmp_path / "good.txt").write_bytes(GOOD)
    with pytest.raises(UserError):
        run(tmp_path / "bad.txt", tmp_path / "out")
    run(tmp_path / "good.txt", tmp_path / "out")


def fail_at(place: str) -> Callable[[pytest.MonkeyPatch], None]:
    def install(patch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError(place)

        owner = {"tokenizer": prepare_module.build_tokenizer, "publish": StagingDir}.get(place, PrepareJob)
        name = {"tokenizer": "build_from_spec", "encode": "write_batch"}.get(place, place)
        patch.setattr(owner, name, fail)

    return install


@pytest.mark.parametrize("place", ["tokenizer", "encode", "finalize", "publish"])
def test_after_a_crash_the_same_command_succeeds(place: str, tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_bytes(GOOD)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(place)(patch)
        with pytest.raises(RuntimeError, match=place):
            run(path, out)
    assert run(path, out).meta.splits["train"].stories == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("left", ["journal.json", "train.digests"])
def test_a_half_removed_staging_directory_is_replaced(left: str, tmp_path: Path) -> None:
    """A kill while the staging directory is being removed may leave any of its files."""
    path, out, remains = tmp_path / "a.txt", tmp_path / "out", tmp_path / "out.draft" / left
    path.write_bytes(GOOD)
    remains.parent.mkdir()
    remains.write_bytes(b"{}")
    assert run(path, out).meta.splits["train"].stories == 2


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(GOOD)
    (tmp_path / "out.draft").mkdir()
    (tmp_path / "out.draft" / "novel.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="not a staging directory"):
        run(tmp_path / "a.txt", tmp_path / "out")
    assert (tmp_path / "out.draft" / "novel.txt").read_bytes() == b"mine"
