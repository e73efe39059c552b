"""A long story in a .csv, .jsonl or .parquet file is read in pieces: the same text and errors, with less memory."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tinystories.data.source import arrow, long_rows, reader
from tinystories.data.source.files import read_file
from tinystories.data.source.long_rows import extract_json_text, parse_csv_row, repair_utf8
from tinystories.data.source.reader import ReadOptions
from tinystories.errors import UserError

STRICT, REPLACE = ReadOptions(), ReadOptions(errors="replace")
IN_PLACE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
FOX = "\U0001f98a"


def read(path: Path, options: ReadOptions = STRICT) -> list[bytes] | str:
    """The stories of a file, or the message of the error."""
    try:
        return [story for batch in read_file(path, options) for story in batch.stories]
    except UserError as error:
        return str(error)


def error_of(call: Callable[[], object]) -> str:
    """The message of the exception that a call raises; empty if it raises none."""
    try:
        call()
    except (ValueError, csv.Error) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is a long one, and pieces have a few bytes."""
    monkeypatch.setattr(reader, "LONG_ROW_BYTES", 0)
    monkeypatch.setattr(long_rows, "PIECE_BYTES", 5)
    monkeypatch.setattr(arrow, "LONG_TEXT_BYTES", 4)


@given(data=st.binary(max_size=30) | st.text(max_size=20).map(str.encode), size=st.integers(4, 9))
def test_utf8_is_checked_in_pieces_as_in_one(data: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_rows, "PIECE_BYTES", size)
        assert repair_utf8(data, "replace") == data.decode(errors="replace").encode()
        message = error_of(lambda: data.decode())
        assert error_of(lambda: repair_utf8(data, "strict")) == message
        assert message or repair_utf8(data, "strict") is data


CSV = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", "bc", " ", FOX, "\x00"]), max_size=14).map(
    "".join
)


@given(text=CSV)
def test_a_csv_row_is_the_one_of_the_csv_module(text: str) -> None:
    lines = text.encode().splitlines(keepends=True) if "\r" not in text else list(io.BytesIO(text.encode()))
    if not lines:
        return
    message = error_of(lambda: next(csv.reader((line.decode() for line in lines), strict=True)))
    assert message.startswith(error_of(lambda: parse_csv_row(iter(lines), 1000)))
    if not message:
        expected = next(csv.reader((line.decode() for line in lines), strict=True))
        assert [field.decode() for field in parse_csv_row(iter(lines), 1000)] == expected


def test_a_csv_row_of_several_quoted_fields() -> None:
    assert parse_csv_row([b'"a","b""c",d,"e\n', b'f"\r\n'], 1000) == [b"a", b'b"c', b"d", b"e\nf"]


@given(texts=st.lists(st.text(alphabet='ab",\n\r é' + FOX, max_size=12), min_size=1, max_size=5))
@IN_PLACE
@pytest.mark.usefixtures("small")
def test_long_csv_rows_are_the_stories(tmp_path: Path, texts: list[str]) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    expected = [story for text in texts if (story := text.encode().replace(b"\r\n", b"\n").strip())]
    assert read(tmp_path / "a.csv") == expected


JSON_TEXTS = st.text(alphabet=st.sampled_from('ab \\"/\n,.é你u0dD\ud83d\ude00' + FOX), max_size=30)


@given(texts=st.lists(JSON_TEXTS, min_size=1, max_size=4), escaped=st.booleans(), replace=st.booleans())
@IN_PLACE
def test_long_json_lines_are_the_stories(tmp_path: Path, texts: list[str], escaped: bool, replace: bool) -> None:
    rows = [{"n": 1.5, "text": text, "other": [text, None, {"text": text}]} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("utf-8", "surrogatepass" if escaped else "replace"))
    options = REPLACE if replace else STRICT
    expected = read(tmp_path / "a.jsonl", options)
    for size in (4, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "LONG_ROW_BYTES", 0)
            patch.setattr(long_rows, "PIECE_BYTES", size)
            assert read(tmp_path / "a.jsonl", options) == expected


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "' + "word " * 9 + '"}', "word " * 9),
        ('{"a": NaN, "text": "' + "word " * 9 + '"}', None),  # NaN is what replaces a long string
        ('{"a": -Infinity, "text": "' + "word " * 9 + '"}', "word " * 9),
        ('{"a": "NaN", "text": "' + "word " * 9 + '"}', None),
        ('{"text": "' + "word " * 9 + '", "text": "b"}', "b"),
        ('{"a": "' + "word " * 9 + '", "text": "short"}', "short"),
        ('{"a": "' + "word " * 9 + '", "text": 1}', None),
        ('{"a": {"text": "' + "word " * 9 + '"}}', None),
        ('["' + "word " * 9 + '"]', None),
        ('{"text": "' + "\\ud83e\\udd8a" * 9 + '"}', FOX * 9),
        ('{"text": "' + "\\\\u00e9" * 9 + '"}', "\\u00e9" * 9),
        ('{"text": "' + '\\"' * 40 + '"}', '"' * 40),
        ('{"text": "' + "word " * 9 + '\\\\"}', "word " * 9 + "\\"),
        ('{"text": "' + "word\n" * 9 + '"}', None),  # a control character: json gives the reason
        ('{"text": "' + "word " * 9 + "\\x" + '"}', None),
        ('{"text": "' + "word " * 9, None),
        ('{"' + "word " * 9 + '": 1, "text": "b"}', None),
        ('{"text": "short"}', None),
    ],
    ids=range(18),
)
def test_what_is_taken_from_a_long_json_line(line: str, text: str | None) -> None:
    assert extract_json_text(line.encode(), "text", "strict") == (None if text is None else text.encode())


LONG = "word " * 20


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", f'id,text\n1,"{LONG}\n', "line 2: invalid CSV: unexpected end of data"),
        ("a.csv", f'id,text\n1,one\n2,"{LONG}"x\n', "line 3: invalid CSV: ',' expected after '\"'"),
        ("a.csv", f"id,text\n1,{LONG}\rx\n", "line 2: invalid CSV: new-line character seen in unquoted field"),
        ("a.csv", f"id,text\n1,{LONG},more\n", "line 2: 3 fields, but the header has 2"),
        ("a.jsonl", f'{{"text": "{LONG}', "line 1: invalid JSON"),
        ("a.jsonl", f'{{"text": "{LONG}"}} x', "line 1: invalid JSON: Extra data at column 114"),
        ("a.jsonl", f'{{"story": "{LONG}"}}', "line 1: no column 'text'; columns: story"),
        ("a.jsonl", f'{{"text": "{LONG}\\ud83d"}}', "surrogates not allowed; pass --errors replace"),
    ],
    ids=range(8),
)
def test_broken_long_rows_are_named(name: str, data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data.encode())
    assert message in str(read(tmp_path / name))


@pytest.mark.usefixtures("small")
def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path: Path) -> None:
    for name, start in (("a.csv", b"id,text\n1,"), ("a.jsonl", b'{"text": "')):
        data = start + LONG.encode() + b"caf\xe9 and tea" + (b"\n" if name == "a.csv" else b'"}\n')
        (tmp_path / name).write_bytes(data)
        assert f"byte {data.index(0xE9)} (0xe9) is not UTF-8" in str(read(tmp_path / name))
        assert read(tmp_path / name, REPLACE) == [f"{LONG}caf\ufffd and tea".encode()]


def test_a_field_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "LONG_ROW_BYTES", 100)
    monkeypatch.setattr(reader, "MAX_STORY_BYTES", 1000)
    (tmp_path / "a.csv").write_text("text\n" + '"' + "a line\n" * 200 + '"\n')
    assert "line 2: invalid CSV: field larger than field limit (1000)" in str(read(tmp_path / "a.csv"))


@pytest.mark.usefixtures("small")
def test_long_texts_of_a_parquet_file_are_read_one_by_one(tmp_path: Path) -> None:
    texts = ["one", "a long one", "two", None, "another long one", "b", "a last one"]
    parquet.write_table(pa.table({"id": range(7), "text": texts}), tmp_path / "a.parquet", row_group_size=4)
    expected = [text.encode() for text in texts if text]
    assert read(tmp_path / "a.parquet") == expected
    for first in range(8):
        batches = read_file(tmp_path / "a.parquet", STRICT, first)
        assert [story for batch in batches for story in batch.stories] == [t.encode() for t in texts[first:] if t]


PROGRAM = """
import csv, json, os, sys
from pathlib import Path
name, story = sys.argv[1], eval(sys.argv[2])
if name == "a.csv":
    with open(name, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, story], [2, "A cat."]])
elif name == "a.parquet":
    import pyarrow as pa
    from pyarrow import parquet
    parquet.write_table(pa.table({"text": [story, "A cat."]}), name)
else:
    rows = [json.dumps({"text": text}, ensure_ascii=name == "b.jsonl") for text in (story, "A cat.")]
    with open(name, "w", encoding="utf-8") as file:
        file.write("\\n".join(rows))
"""
MEASURE = """
import sys
from tinystories.data.prepare import prepare
prepare(sys.argv[1], "out", tokenizer=sys.argv[2], progress=False)
# Not ru_maxrss: a child begins with its parent's.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
STORY = "('the cat ran to a house and \"saw\" ' * 30 + '\\n') * 62_000 + chr(0x1f98a)"


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process")
@pytest.mark.parametrize(
    ("name", "story"),
    [
        ("a.csv", STORY),
        ("a.csv", f"({STORY}).replace('\\n', ' ')"),
        ("a.jsonl", STORY),
        ("b.jsonl", STORY),
        ("a.parquet", STORY),
        ("a.csv", "'0123456789 ' * 5_600_000"),  # an id per byte
    ],
    ids=["csv", "csv of one line", "jsonl", "jsonl with escapes", "parquet", "digits"],
)
def test_a_story_of_62_mb_takes_less_than_600_mb(name: str, story: str, tmp_path: Path, sample_data: Path) -> None:
    """The reported cases took 640 to 1,000 MB."""
    subprocess.run([sys.executable, "-c", PROGRAM, name, story], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(sample_data / "tokenizer.json")],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 600_000  # kB
