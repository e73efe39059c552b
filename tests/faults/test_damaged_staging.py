"""What an interrupted `prepare` left may be damaged: the next one starts over, or says in a line what is in its way."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tinystories.data import staging
from tinystories.data.prepare import prepare
from tinystories.data.source import reader
from tinystories.data.staging import StagingDir
from tinystories.data.tokenizer import END
from tinystories.errors import UserError

STORIES = [f"Once there was cat number {n}. It sat on mat {n % 7}, and {n * n % 11} dogs saw it." for n in range(120)]


def run(folder: Path) -> dict[str, bytes]:
    """The files that a preparation of the stories makes in the folder `out`."""
    prepare(folder / "a.txt", folder / "out", tokenizer="bpe:280", val_fraction=0.2, progress=False)
    # meta.json has the path of the source.
    return {path.name: path.read_bytes().replace(bytes(folder), b"") for path in (folder / "out").iterdir()}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder in which a preparation stopped half-way, and the files of a straight one there."""
    folder = tmp_path_factory.mktemp("staging")
    (folder / "a.txt").write_text(f"{END}\n".join(STORIES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BATCH_BYTES", 1000)
        patch.setattr(staging, "JOURNAL_INTERVAL_SECONDS", 0.0)
        straight = run(folder)
        shutil.rmtree(folder / "out")
        save, calls = StagingDir.save, iter(range(100))

        def stop(self: StagingDir, **options: bool) -> None:
            if next(calls) == 5:
                raise RuntimeError("stop")
            save(self, **options)

        patch.setattr(StagingDir, "save", stop)
        with pytest.raises(RuntimeError, match="stop"):
            run(folder)
    assert sorted(path.name for path in (folder / "out.draft").iterdir()) == [
        "data", "journal.json", "lock", "request.json", "train.digests", "val.digests"
    ]  # fmt: skip
    return folder, straight


@pytest.fixture
def copy(interrupted: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    shutil.copytree(interrupted[0], tmp_path / "copy")
    return tmp_path / "copy"


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Damage to a journal that is still JSON."""

    def damage(path: Path) -> None:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def replace(value: bytes, at: int = -1) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        at_byte = at if at >= 0 else len(data) // 3
        data[at_byte : at_byte + len(value)] = value
        path.write_bytes(data)

    return damage


def link(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def become(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def test_without_damage_the_work_is_not_repeated(
    copy: Path, interrupted: tuple[Path, dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert run(copy) == interrupted[1]
    assert "resuming from" in caplog.text


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data/train.bin", replace(b"\xff")),
        ("data/train.idx", replace(b"\xff\xff", 8)),
        ("train.digests", replace(b"\x01")),
        ("val.digests", replace(b"\x01", 0)),
        ("data/tokenizer.json", lambda path: path.write_text(path.read_text().replace(",", ", ", 1))),
        ("data/tokenizer.json", lambda path: path.write_bytes(path.read_bytes()[:99])),
        ("data/tokenizer.json", lambda path: path.write_bytes(path.read_bytes() + b"x")),
        ("data/train.bin", become(Path.mkdir)),
        ("data/val.idx", become(os.mkfifo)),
        ("data/val.bin", link("nowhere")),
        ("data/val.bin", link("val.bin")),
        ("data/val.bin", link("/dev/zero")),
        ("journal.json", link("..")),
        ("journal.json", become(Path.mkdir)),
        ("journal.json", become(os.mkfifo)),
        ("request.json", become(Path.mkdir)),
        ("request.json", link("/dev/zero")),
        ("journal.json", edit(lambda record: record.update(stage=5))),
        ("journal.json", edit(lambda record: record.update(stage="x"))),
        ("journal.json", edit(lambda record: record.update(position=[0, 3]))),
        ("journal.json", edit(lambda record: record.update(position=None))),
        ("journal.json", edit(lambda record: record.update(position=[7, 3]))),
        ("journal.json", edit(lambda record: record.update(sizes=[]))),
        ("journal.json", edit(lambda record: record["sizes"].update({"data/train.bin": "x"}))),  # type: ignore[attr-defined]
        ("journal.json", edit(lambda record: record["sizes"].update({"../a.txt": 7}))),  # type: ignore[attr-defined]
        ("journal.json", edit(lambda record: record.update(counts=None))),
        ("journal.json", edit(lambda record: record.update(read=-1))),
        ("journal.json", edit(lambda record: record.update(unknown=1))),
        ("journal.json", edit(lambda record: record.pop("hash"))),
        ("journal.json", lambda path: path.write_text("[" * 100_000)),
        ("journal.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
    ids=range(31),
)
def test_damage_is_seen_and_the_run_starts_over(
    name: str,
    damage: Callable[[Path], None],
    copy: Path,
    interrupted: tuple[Path, dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first is the reported case: the result differed from that of a straight run."""
    damage(copy / "out.draft" / name)
    assert run(copy) == interrupted[1]
    assert "belongs to a different request or is damaged; starting over" in caplog.text
    assert sorted(path.name for path in copy.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=range(3))
def test_a_lock_that_is_not_a_file_is_named(make: Callable[[Path], object], copy: Path) -> None:
    """A relative: opening a pipe waited forever."""
    become(make)(copy / "out.draft" / "lock")
    with pytest.raises(UserError, match=r"out\.draft/lock cannot be written: it is not a regular file"):
        run(copy)


def test_a_staging_directory_of_an_earlier_version_is_started_over(
    copy: Path, interrupted: tuple[Path, dict[str, bytes]]
) -> None:
    """A relative: its journal has no hashes."""
    path = copy / "out.draft" / "journal.json"
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: record[name] for name in record if name not in ("hash", "hashes", "tokenizer_sha256")})
    )
    assert run(copy) == interrupted[1]


def test_damage_to_what_the_journal_does_not_cover_changes_nothing(
    copy: Path, interrupted: tuple[Path, dict[str, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    """A relative: a kill leaves half-written data there."""
    for path in (copy / "out.draft" / "data").glob("*.*"):
        if path.suffix != ".json":
            path.write_bytes(path.read_bytes() + b"half-written")
    with caplog.at_level("INFO"):
        assert run(copy) == interrupted[1]
    assert "resuming from" in caplog.text
