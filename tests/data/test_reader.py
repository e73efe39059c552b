"""Reading files: every format yields the same stories from any position and chunk size; errors name the location."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from story_files import put, write_csv, write_jsonl, write_parquet, write_txt

from tinystories.data.source import reader
from tinystories.data.source.files import read_file
from tinystories.data.source.reader import ReadOptions
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END
from tinystories.errors import UserError

Write = Callable[[Path, list[str]], Path]

STRICT, REPLACE = ReadOptions(), ReadOptions(errors="replace")


def as_txt(folder: Path, texts: list[str]) -> Path:
    return write_txt(folder / "stories.txt", texts)


def as_jsonl(folder: Path, texts: list[str]) -> Path:
    return write_jsonl(folder / "stories.jsonl", texts)


def as_csv(folder: Path, texts: list[str]) -> Path:
    return write_csv(folder / "stories.csv", texts)


def as_parquet(folder: Path, texts: list[str]) -> Path:
    return write_parquet(folder / "stories.parquet", texts)


def read(path: Path, options: ReadOptions = STRICT) -> list[str]:
    return [story.decode() for batch in read_file(path, options) for story in batch.stories]


def error_of(path: Path, options: ReadOptions = STRICT) -> str:
    with pytest.raises(UserError) as caught:
        read(path, options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


FORMATS = pytest.mark.parametrize("write", [as_txt, as_jsonl, as_csv, as_parquet])


@FORMATS
def test_all_formats_give_the_stories(write: Write, tmp_path: Path, many: list[str]) -> None:
    assert read(write(tmp_path, many)) == many


@FORMATS
@pytest.mark.parametrize("size", [30, 500])
def test_reading_resumes_from_any_batch(
    write: Write, size: int, tmp_path: Path, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", size)
    path = write(tmp_path, [*many[:50], " ", *many[50:]])
    batches = list(read_file(path, STRICT))
    assert len(batches) > 20
    assert sum(batch.n_empty for batch in batches) == 1
    for n, batch in enumerate(batches):
        position = json.loads(json.dumps(batch.position))
        rest = [story.decode() for later in read_file(path, STRICT, position) for story in later.stories]
        assert rest == [story.decode() for later in batches[n + 1 :] for story in later.stories]


@pytest.mark.parametrize("write", [as_txt, as_jsonl, as_csv])
def test_bytes_read_add_up_to_the_file(write: Write, tmp_path: Path, many: list[str]) -> None:
    path = write(tmp_path, many)
    header = len(b"id,text\r\n") if path.suffix == ".csv" else 0
    trailing = len("\n") if path.suffix == ".txt" else 0  # after the last END
    assert sum(batch.bytes_read for batch in read_file(path, STRICT)) == path.stat().st_size - header - trailing


PIECES = st.lists(st.text(alphabet="ab \n\r<|>é你") | st.just(END[:5]) | st.just(END[6:]), max_size=8)


@given(pieces=PIECES, size=st.integers(1, 40), closed=st.booleans(), newline=st.sampled_from(["\n", "\r\n", ""]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_never_show_in_txt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[str], size: int, closed: bool, newline: str
) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", size)
    text = f"{newline}{END}{newline}".join([*pieces, ""] if closed else ["first", *pieces, "last"])
    if END not in text:
        return
    expected = [s for piece in text.replace("\r\n", "\n").split(END) if (s := piece.strip(" \n\r"))]
    assert read(put(tmp_path / "x.txt", text.encode())) == expected


def test_windows_newlines_and_byte_order_marks_leave_no_trace(tmp_path: Path) -> None:
    text = f"One.\r\nTwo.\r\n{END}\r\nThree.\r\n{END}\r\n"
    for name, data in (
        ("a.txt", text.encode()),
        ("b.txt", text.encode("utf-8-sig")),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "One.\\r\\nTwo."}\r\n\r\n{"text": "Three.\\r\\n"}\r\n'),
        ("a.csv", b'\xef\xbb\xbftext\r\n"One.\r\nTwo."\r\nThree.\r\n'),
    ):
        assert read(put(tmp_path / name, data)) == ["One.\nTwo.", "Three."]


def test_a_last_story_needs_no_separator_behind_it(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.txt", f"one{END}two".encode())) == ["one", "two"]
    assert read(put(tmp_path / "b.txt", f"one\n{END}\n \n".encode())) == ["one"]


def test_end_in_a_field_is_text(tmp_path: Path) -> None:
    texts = [f"a {END} b", END]
    for write in (as_jsonl, as_csv, as_parquet):
        assert read(write(tmp_path, texts)) == texts


@FORMATS
def test_empty_stories_are_dropped_and_counted(write: Write, tmp_path: Path) -> None:
    batches = list(read_file(write(tmp_path, ["", "one", " \n\t ", "two", "\r\n"]), STRICT))
    assert [story for batch in batches for story in batch.stories] == [b"one", b"two"]
    assert sum(batch.n_empty for batch in batches) == 3


def test_null_counts_as_empty(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["one", None]}), tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", put(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": null}\n')):
        (batch,) = read_file(path, STRICT)
        assert (batch.stories, batch.n_empty) == ([b"one"], 1)


@FORMATS
def test_an_empty_file_is_refused(write: Write, tmp_path: Path) -> None:
    path = put(write(tmp_path, []), b"")
    with pytest.raises(UserError, match="is empty"):
        next(iter_stories(path))


def test_text_without_a_separator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.txt", b"Once upon a time\n" * 99)
    assert f"no {END} in the whole file" in error_of(path)
    assert ".jsonl" in error_of(path)
    monkeypatch.setattr(reader, "BATCH_BYTES", 100_000)
    monkeypatch.setattr(reader, "MAX_STORY_BYTES", 1 << 20)
    path = put(tmp_path / "b.txt", f"one{END}".encode() + b"Once upon a time\n" * 99_999)
    assert f"no {END} in the 1 MB from byte 16 on" in error_of(path)  # and not the whole file in memory


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", f"one{END}".encode() + b"caf\xe9 and tea" + END.encode()),
        ("a.txt", f"one{END}".encode() + b"caf\xe9 and tea"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9 and tea"}\n'),
        ("a.csv", b'text\nx\n"a\ncaf\xe9 and tea"\n'),
    ],
)
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_bytes_that_are_not_utf8_are_named_or_replaced(
    name: str, data: bytes, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BATCH_BYTES", size)
    path = put(tmp_path / name, data)
    message = error_of(path)
    assert f"byte {data.index(0xE9)} (0xe9) is not UTF-8" in message
    assert "--errors replace" in message
    assert read(path, REPLACE)[-1].endswith("caf\ufffd and tea")


def test_parquet_text_that_is_not_utf8_is_named_or_replaced(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    assert "row 1: byte 3 (0xe9) is not UTF-8" in error_of(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", REPLACE) == ["one", "caf\ufffd"]


def test_half_a_surrogate_pair_is_named_or_replaced(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "fine \\ud83d\\ude00"}\n{"text": "half \\ud83d!"}\n')
    assert "line 2" in error_of(path)
    assert read(path, REPLACE) == ["fine \U0001f600", "half \ufffd!"]


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
def test_a_missing_column_is_answered_with_those_there_are(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ["one"])
    message = error_of(path, ReadOptions(text_field="story"))
    assert "no column 'story'" in message
    assert "columns: id, text" in message
    assert "--text-field" in message


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
def test_another_column_can_be_chosen(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path, ["one", "two"])
    if path.suffix == ".csv":
        assert read(path, ReadOptions(text_field="id")) == ["0", "1"]
    else:
        assert "not text" in error_of(path, ReadOptions(text_field="id"))


def test_a_later_jsonl_line_without_the_field_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'{"text": "one"}\n\n{"story": "two"}\n')
    assert "line 3: no column 'text'; columns: story" in error_of(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "two', "invalid JSON"),
        (b'{"text": "two"} x', "invalid JSON: Extra data at column 17"),
        (b"two", "invalid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'"two"', "expected a JSON object"),
        (b'{"text": 2}', "'text' is int, not text"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"text": "two", "n": ' + b"9" * 5000 + b"}", "invalid JSON"),
    ],
)
def test_broken_jsonl_lines_are_named(line: bytes, what: str, tmp_path: Path) -> None:
    message = error_of(put(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b"\n"))
    assert "line 2: " in message
    assert what in message


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (b"1,one,more\n", "line 2: 3 fields, but the header has 2"),
        (b"1\n", "line 2: 1 fields"),
        (b'1,"one\n2,two\n3,three\n', "line 2: invalid CSV"),  # the quote is never closed
        (b'1,one\n2,"two"x\n', "line 3: invalid CSV"),
    ],
)
def test_broken_csv_rows_are_named(rows: bytes, what: str, tmp_path: Path) -> None:
    assert what in error_of(put(tmp_path / "a.csv", b"id,text\n" + rows))


def test_long_fields_and_blank_lines_are_fine_in_csv(tmp_path: Path) -> None:
    long = "very " * 40_000 + "long"  # longer than the default limit of the csv module
    assert read(put(tmp_path / "a.csv", f"text\n\n{long}\n\ntwo\n".encode())) == [long, "two"]


def test_endless_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_STORY_BYTES", 1 << 20)
    path = put(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "' + b"x" * (2 << 20))
    assert "line 2: longer than 1 MB" in error_of(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_parquet_is_named(keep: float, tmp_path: Path, many: list[str]) -> None:
    path = as_parquet(tmp_path, many)
    data = path.read_bytes()
    put(path, data[: max(8, int(keep * len(data)))])
    assert "parquet" in error_of(path)


def test_damaged_parquet_is_an_error_of_the_user(tmp_path: Path, many: list[str]) -> None:
    path = as_parquet(tmp_path, many)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    assert "parquet" in error_of(put(path, bytes(data)))


def test_unreadable_paths_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read: Is a directory" in error_of(tmp_path / "folder.txt")
    path = put(tmp_path / "a.txt", b"one")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read: Permission denied" in error_of(path)
