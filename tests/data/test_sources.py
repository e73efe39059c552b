"""Source names: what they resolve to, and the errors for invalid ones."""

import os
from pathlib import Path

import pytest
from story_files import put, write_txt

from tinystories.data.source import files as file_source
from tinystories.data.source.files import FileSource, fingerprint_file
from tinystories.data.source.hub import HubSource
from tinystories.data.source.resolve import get_named_sources, iter_stories, resolve_source
from tinystories.errors import UserError


def test_the_bundled_stories_are_many_and_different() -> None:
    texts = list(iter_stories("sample"))
    assert len(texts) >= 150
    assert len(set(texts)) == len(texts)


def test_names_mean_collections_and_paths_mean_files(tmp_path: Path) -> None:
    path = write_txt(tmp_path / "a.txt", ["One."])
    for name in get_named_sources():
        assert resolve_source(name).name == resolve_source([name]).name == name
    assert resolve_source("hf:owner/name") == HubSource(name="hf:owner/name", repo="owner/name")
    assert resolve_source("hf:owner/na.me-1@refs/x") == HubSource(
        name="hf:owner/na.me-1@refs/x", repo="owner/na.me-1", revision="refs/x"
    )
    for names in (path, str(path), [path], (str(path),)):
        assert resolve_source(names) == FileSource(str(path), (path,))


@pytest.mark.parametrize("name", ["hf:name", "hf:", "hf:a/b/c", "hf:a/b@", "hf:a b/c"])
def test_malformed_hub_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not of the form hf:OWNER/NAME"):
        resolve_source(name)


def test_unknown_names_are_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="tinystorys is neither a file") as caught:
        resolve_source("tinystorys")
    for name in ("sample", "tinystories", "tinystories-v2", "tinystories-clean", "hf:OWNER/NAME"):
        assert name in str(caught.value)


def test_files_that_hold_no_stories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.pdf: unknown format; use \.txt, \.jsonl, \.csv, \.parquet"):
        resolve_source(put(tmp_path / "a.pdf", b"%PDF"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: no \.txt.* file in this folder"):
        resolve_source(tmp_path / "folder")
    put(tmp_path / "folder" / "a.txt", b"")
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        resolve_source(tmp_path / "folder")


def test_a_source_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read: Permission denied"):
        resolve_source(tmp_path / "a.txt")


@pytest.mark.parametrize("small", [True, False])
def test_fingerprints_follow_the_content(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_source, "SMALL_FILE_BYTES", 1 << 20 if small else 100)
    path = put(tmp_path / "a.txt", b"x" * 300_000)
    first = fingerprint_file(path)
    assert fingerprint_file(path) == first
    put(path, b"x" * 299_999 + b"y")
    changed = fingerprint_file(path)
    assert changed != first
    put(path, b"x" * 300_001)
    assert fingerprint_file(path) not in (first, changed)


def test_a_large_file_written_again_is_another_even_if_no_sample_of_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_source, "SMALL_FILE_BYTES", 100)
    data = bytearray(8 << 20)  # 64 samples of 64 KB every 128 KB
    path = put(tmp_path / "a.txt", bytes(data))
    first = fingerprint_file(path)
    data[100_000] = 1
    put(path, bytes(data))
    os.utime(path, ns=(1, 1))
    assert fingerprint_file(path) != first
