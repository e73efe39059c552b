"""Stories as users have them: links, hidden files, other encodings, compression, placeholders, Arrow types, pipes."""

import bz2
import gzip
import io
import logging
import lzma
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tinystories.data.prepare import prepare
from tinystories.data.source import reader
from tinystories.data.source.files import FileSource, read_file
from tinystories.data.source.reader import ReadOptions
from tinystories.data.source.resolve import iter_stories, resolve_source
from tinystories.data.tokenizer import END
from tinystories.errors import UserError

TXT = f"A cat sat.\n{END}\nA dog ran.\n{END}\n".encode()
JSONL = b'{"text": "A cat sat."}\n{"text": "A dog ran."}\n'
CSV = b'text,n\n"A cat sat.",1\nA dog ran.,2\n'
STORIES = ["A cat sat.", "A dog ran."]


def put(path: Path, data: bytes = TXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def story_of(path: Path) -> Path:
    """A file with one story, its own name."""
    return put(path, f"{path.name}{END}".encode())


def refusal(path: Path) -> str:
    """The one-line error with which a source is refused."""
    with pytest.raises(UserError) as caught:
        list(iter_stories(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Links


def test_a_linked_folder_of_stories_is_read(tmp_path: Path) -> None:
    """The reported case: a symbolic link to a folder on a larger disk was skipped without a word."""
    story_of(tmp_path / "big" / "b.txt")
    story_of(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "more").symlink_to("../big")
    assert list(iter_stories(tmp_path / "data")) == ["a.txt", "b.txt"]


def test_a_linked_file_and_a_linked_source_are_read(tmp_path: Path) -> None:
    story_of(tmp_path / "big" / "b.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.txt").symlink_to("../big/b.txt")
    (tmp_path / "source").symlink_to("data")
    assert list(iter_stories(tmp_path / "source")) == ["b.txt"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    story_of(tmp_path / "data" / "sub" / "a.txt")
    (tmp_path / "data" / "sub" / "loop").symlink_to("..")
    (tmp_path / "data" / "again").symlink_to("sub")
    assert list(iter_stories(tmp_path / "data")) == ["a.txt"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    story_of(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "b.txt").symlink_to("gone.txt")
    for source in (tmp_path / "data", tmp_path / "data" / "b.txt"):
        assert refusal(source) == f"{tmp_path}/data/b.txt is a broken link to gone.txt; fix or remove it"


def test_a_folder_that_cannot_be_searched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story_of(tmp_path / "a.txt")

    def refuse(_: object, onerror: Callable[[OSError], None], **__: object) -> Iterator[object]:
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "lost")))
        return iter(())

    monkeypatch.setattr(os, "walk", refuse)
    assert refusal(tmp_path) == f"{tmp_path}/lost cannot be read: Permission denied"


@pytest.mark.parametrize("target", ["disk", "disk/not/yet"])
def test_output_goes_through_a_link(target: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(target)
    for up_to_date in (False, True):
        report = prepare(put(tmp_path / "a.txt"), tmp_path / "out", tokenizer="bpe:300", progress=False)
        assert report.up_to_date == up_to_date
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / target / "meta.json").is_file()
    assert not list(tmp_path.rglob("*.draft"))


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="not a valid output path"):
        prepare("../a.txt", ".", tokenizer="bpe:300", progress=False)


# Hidden files and what editors leave behind


@pytest.mark.parametrize(
    "name",
    [
        ".git/a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/._a.txt",
        "._a.txt",
        ".#a.txt",
        "#a.txt#",
        "a.txt~",
        "~$a.csv",
        ".DS_Store",
        "sub/.a.txt.swp",
    ],
)
def test_clutter_in_a_folder_is_left_out(name: str, tmp_path: Path) -> None:
    story_of(tmp_path / "a.txt")
    put(tmp_path / name, b"not a story")
    assert list(iter_stories(tmp_path)) == ["a.txt"]


def test_a_hidden_source_that_is_named_is_read(tmp_path: Path) -> None:
    assert list(iter_stories(story_of(tmp_path / ".cache" / ".a.txt"))) == [".a.txt"]
    story_of(tmp_path / ".cache" / "b.txt")
    assert list(iter_stories(tmp_path / ".cache")) == ["b.txt"]


def test_files_of_other_formats_in_a_folder_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    story_of(tmp_path / "a.txt")
    for name in ("README.md", "b.zip", "c.json", "d.pdf"):
        put(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert list(iter_stories(tmp_path)) == ["a.txt"]
    assert "skipping 4 files of other formats: README.md, b.zip, c.json, ..." in caplog.text


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_wide_encodings_are_named_with_the_cure(encoding: str, name: str, tmp_path: Path) -> None:
    data = {"a.txt": TXT, "a.jsonl": JSONL, "a.csv": CSV}[name].decode()
    mark = "\ufeff" if encoding in ("utf-32-le", "utf-32-be") else ""
    message = refusal(put(tmp_path / name, (mark + data).encode(encoding)))
    assert message.startswith(f"{tmp_path / name} is {encoding[:6].upper()}")
    assert "; run: iconv -f UTF-" in message


def test_wide_encodings_are_not_replaced_character_by_character(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", TXT.decode().encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text"):
        list(iter_stories(path, errors="replace"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_single_byte_encodings_are_named_with_the_cure(encoding: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path / "a.txt", f"A café.{END}".encode(encoding)))
    assert "byte 5 (0xe9) is not UTF-8" in message
    assert "iconv -f WINDOWS-1252 -t UTF-8" in message


def test_utf8_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for name, data in (("a.txt", TXT), ("a.jsonl", JSONL), ("a.csv", CSV)):
        for content in (b"\xef\xbb\xbf" + data, gzip.compress(b"\xef\xbb\xbf" + data)):
            assert list(iter_stories(put(tmp_path / name, content))) == STORIES


# Compression and placeholders


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", TXT), ("a.jsonl", JSONL), ("a.csv", CSV)], ids=["txt", "jsonl", "csv"]
)
def test_compressed_files_are_read(name: str, data: bytes, suffix: str, tmp_path: Path) -> None:
    compressed = COMPRESS[suffix](data)
    assert list(iter_stories(put(tmp_path / "1" / f"{name}.{suffix}", compressed))) == STORIES
    assert list(iter_stories(tmp_path / "1")) == STORIES, "in a folder"
    assert list(iter_stories(put(tmp_path / "2" / name, compressed))) == STORIES, "by content, not by name"
    assert list(iter_stories(put(tmp_path / "3" / f"{name}.{suffix}", data))) == STORIES, "or decompressed already"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reading_compressed_files_resumes(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", 100)
    texts = [f"Story number {n}." for n in range(60)]
    path = put(tmp_path / f"a.txt.{suffix}", COMPRESS[suffix]("".join(text + END for text in texts).encode()))
    batches = list(read_file(path, ReadOptions()))
    assert len(batches) > 10
    for n, batch in enumerate(batches):
        later = [story for rest in read_file(path, ReadOptions(), batch.position) for story in rest.stories]
        assert later == [story for rest in batches[n + 1 :] for story in rest.stories]


def test_the_size_of_compressed_text_is_unknown(tmp_path: Path) -> None:
    plain, packed = put(tmp_path / "a.txt"), put(tmp_path / "b.txt.gz", gzip.compress(TXT))
    assert FileSource("a", (plain,)).total_bytes == len(TXT)
    assert FileSource("a", (plain, packed)).total_bytes == 0


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_compressed_files_are_named(suffix: str, damage: str, tmp_path: Path) -> None:
    data = COMPRESS[suffix](os.urandom(4000) + TXT)
    broken = data[:-30] if damage == "truncated" else data[:2000] + b"\0" * 50 + data[2050:]
    path = put(tmp_path / f"a.txt.{suffix}", broken)
    with pytest.raises(UserError, match=r"is damaged or incomplete: .*; download it again"):
        list(iter_stories(path, errors="replace"))


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", TXT)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run: git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run: git lfs pull"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x24", "Zstandard, which is not supported; run: zstd -d FILE"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x24", "Zstandard"),
        ("a.zip", zip_file(), "run: unzip FILE"),
        ("a.txt", zip_file(), "run: unzip FILE"),
        ("a.txt", b"7z\xbc\xaf\x27\x1c\0\4", "run: 7z x FILE"),
        ("a.txt", b"Rar!\x1a\x07\0", "run: unrar x FILE"),
        ("a.txt.gz", gzip.compress(b"a" * 257 + b"ustar\0" + b"\0" * 300), "is a tar archive"),
        ("a.txt.gz", gzip.compress(TXT.decode().encode("utf-16")), "is UTF-16 text"),
        ("a.parquet", gzip.compress(b"PAR1"), "is a compressed parquet file"),
        ("a.csv", b"PAR1\0\0", "rename it to NAME.parquet"),
        ("a.gz", gzip.compress(TXT), "unknown format; use .txt"),
    ],
    ids=range(13),
)
def test_unreadable_contents_are_named_with_the_cure(name: str, data: bytes, what: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path / name, data))
    assert message.startswith(str(tmp_path / name))
    assert what in message


def test_an_archive_among_the_files_of_a_folder_is_named(tmp_path: Path) -> None:
    story_of(tmp_path / "a.txt")
    put(tmp_path / "b.jsonl.zst", b"\x28\xb5\x2f\xfd\x24")
    assert "b.jsonl.zst is compressed with Zstandard" in refusal(tmp_path)


# Arrow's types of text


TEXT = pa.array(["A cat sat.", None, "A dog ran."])


@pytest.mark.parametrize(
    "column",
    [
        TEXT.dictionary_encode(),  # the reported cases: a category of pandas, and
        TEXT.cast(pa.string_view()),  # what Polars 1.38 wrote
        TEXT.cast(pa.large_string()),
        TEXT.cast(pa.large_string()).dictionary_encode(),
        TEXT.cast(pa.dictionary(pa.int8(), pa.string())),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text_is_read(column: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (batch,) = read_file(tmp_path / "a.parquet", ReadOptions())
    assert (batch.stories, batch.n_empty) == ([b"A cat sat.", b"A dog ran."], 1)


def test_a_column_of_nulls_is_read(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    (batch,) = read_file(tmp_path / "a.parquet", ReadOptions())
    assert (batch.stories, batch.n_empty) == ([], 3)


@pytest.mark.parametrize(
    "column",
    [pa.array([1, 2]), pa.array([["a"], ["b"]]), pa.array([b"a", b"b"]), pa.array([1, 2]).dictionary_encode()],
    ids=lambda column: str(column.type),
)
def test_other_types_are_named(column: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "not text" in refusal(tmp_path / "a.parquet")


# Pipes


@pytest.fixture
def feed() -> Iterator[Callable[[Path, bytes], Path]]:
    """Create a FIFO that a thread writes into."""
    threads: list[threading.Thread] = []

    def create(path: Path, data: bytes) -> Path:
        if not path.exists():
            os.mkfifo(path)
        threads.append(threading.Thread(target=path.write_bytes, args=(data,), daemon=True))
        threads[-1].start()
        return path

    yield create
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("pipe", TXT),
        ("pipe", JSONL),
        ("pipe", gzip.compress(JSONL)),
        ("pipe.csv", CSV),
        ("pipe.txt.xz", lzma.compress(TXT)),
    ],
    ids=["txt", "jsonl", "jsonl.gz", "csv", "txt.xz"],
)
def test_a_fifo_is_read(name: str, data: bytes, feed: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    assert list(iter_stories(feed(tmp_path / name, data))) == STORIES


def test_preparing_the_same_pipe_twice_does_nothing(feed: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    for up_to_date in (False, True):
        source = feed(tmp_path / "pipe", TXT)
        report = prepare(source, tmp_path / "out", tokenizer="bpe:300", progress=False)
        assert report.up_to_date == up_to_date
        assert report.meta.source == str(source)


def test_the_copy_of_a_pipe_is_removed(feed: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    source = resolve_source(feed(tmp_path / "pipe", TXT))
    assert isinstance(source, FileSource)
    (copy,) = source.paths
    assert copy.exists()
    del source
    assert not copy.parent.exists()


def test_errors_name_the_pipe(feed: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    assert refusal(feed(tmp_path / "pipe", b"no separator")).startswith(f"{tmp_path}/pipe: no {END}")
    assert refusal(feed(tmp_path / "pipe", b"")).startswith(f"{tmp_path}/pipe is empty")
    assert refusal(feed(tmp_path / "pipe", zip_file())).startswith(f"{tmp_path}/pipe is a zip archive")


def test_a_copy_that_does_not_fit_is_named(
    feed: Callable[[Path, bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(source: io.BufferedReader, *_: object) -> None:
        source.read()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", fill)
    message = refusal(feed(tmp_path / "pipe", TXT))
    assert "No space left on device; set TMPDIR" in message


@pytest.mark.extended
@pytest.mark.parametrize("words", ["prepare -", "prepare /dev/stdin", "prepare <(cat)", "prepare <(gzip)"])
def test_standard_input_and_process_substitution_are_read(words: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m tinystories {words} --tokenizer bpe:300 --out out"
    done = subprocess.run(
        ["bash", "-c", f"exec 3<&0; {command.replace('(cat)', '(cat <&3)').replace('(gzip)', '(gzip <&3)')}"],
        cwd=tmp_path,
        input=TXT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"2 stories" in done.stdout
