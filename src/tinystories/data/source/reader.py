"""Read stories from .txt, .jsonl and .csv in batches: constant memory, resumable after each batch."""

import csv
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from tinystories.data.source.long_rows import LONG_ROW_BYTES, extract_json_text, parse_csv_row, repair_utf8
from tinystories.data.tokenizer import END, sanitize
from tinystories.errors import UserError, list_names

DecodeErrors = Literal["strict", "replace"]

# Text per batch: enough to keep all cores busy, small enough to stay in the CPU caches.
BATCH_BYTES = 4 << 20
# Longest story, line or field; a longer one means that the file is broken.
MAX_STORY_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read stories: the field or column of the text, and how to handle invalid UTF-8 (as in `bytes.decode`)."""

    text_field: str = "text"
    errors: DecodeErrors = "strict"


@dataclasses.dataclass(frozen=True, slots=True)
class StoryBatch:
    """Some stories in UTF-8: stripped of ASCII white space, with `\\n` newlines, none empty.

    They are bytes because they are hashed, measured and tokenized as bytes. `position` is where the next batch starts;
    it is JSON-serializable, and its shape depends on the format.
    """

    stories: list[bytes]
    n_empty: int  # empty stories dropped
    position: Any
    bytes_read: int  # bytes of the source consumed by this batch


@runtime_checkable
class Cursor(Protocol):
    """The current position of a reader."""

    @property
    def position(self) -> Any:
        """Where to resume, JSON-serializable."""

    @property
    def bytes_read(self) -> int:
        """Bytes read since the start of the file."""


def read_txt(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Yield batches of a text file whose stories are followed or separated by END.

    `where` names the file in errors. `position` is the byte offset just after an END. Raises `UserError` if there is no
    END, since the whole file would be one story.
    """
    start: int = position or skip_bom(file)
    file.seek(start)
    found_separator = position is not None
    chunks: list[bytes] = []  # the story being read; joined only once, so that time is linear in its length
    size, tail = 0, b""  # its length, and its end, which may hold the first part of an END
    while chunk := file.read(BATCH_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if END.encode() in (window := tail + chunk):
            batch, remainder = parse_txt_chunks(where, chunks, start, options)
            yield batch
            start, found_separator = batch.position, True
            chunks, size, tail = [remainder], len(remainder), remainder[1 - len(END) :]
        elif size > MAX_STORY_BYTES:
            raise UserError(missing_separator_message(where, f"the {MAX_STORY_BYTES >> 20} MB from byte {start} on"))
        else:
            tail = window[1 - len(END) :]
    if not found_separator:
        raise UserError(missing_separator_message(where, "the whole file"))
    remainder = b"".join(chunks)
    if remainder.strip():  # the last story, not followed by END
        yield dataclasses.replace(parse_txt_batch(where, [remainder], start, options), position=start + len(remainder))


def parse_txt_chunks(where: str, chunks: list[bytes], start: int, options: ReadOptions) -> tuple[StoryBatch, bytes]:
    """Return the batch of the stories in the chunks, which start at byte `start`, and what follows the last END.

    Empties `chunks`: a long story is not kept in memory twice.
    """
    data = b"".join(chunks)
    chunks.clear()
    *pieces, remainder = data.split(END.encode())
    del data
    return parse_txt_batch(where, pieces, start, options), remainder


def parse_txt_batch(where: str, pieces: list[bytes], start: int, options: ReadOptions) -> StoryBatch:
    """Return the batch of the texts between ENDs, which start at byte `start` of the file."""
    stories = [story for piece in pieces if (story := piece.strip())]
    for number, story in enumerate(stories):
        if not story.isascii() or b"\r" in story:
            try:
                story = repair_utf8(story, options.errors)
            except UnicodeDecodeError:
                check_text(where, END.encode().join(pieces), options, start)  # an error with the offset in the file
            stories[number] = story.replace(b"\r\n", b"\n")
    size = sum(map(len, pieces)) + len(END) * len(pieces)
    return StoryBatch(stories, len(pieces) - len(stories), start + size, size)


def missing_separator_message(where: str, part: str) -> str:
    return f"{where}: no {END} in {part}; put a line {END} after every story (even a single one), or use .jsonl"


def read_jsonl(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Yield batches of a file with one JSON object per line. `position` is [byte offset, number of lines read]."""
    lines = LineReader(where, file, position)
    yield from batch_texts(parse_jsonl(where, lines, options), lines)


def parse_jsonl(where: str, lines: "LineReader", options: ReadOptions) -> Iterator[bytes]:
    """Yield the text field of each JSON line; blank lines are skipped. Raises `UserError` with the line number."""
    for line in lines:
        text = None
        if len(line) > LONG_ROW_BYTES:
            line = check_text(where, line, options, lines.start_offset)
            text = extract_json_text(line, options.text_field, options.errors)
        if text is None:
            if not (row := decode_text(where, line, options, lines.start_offset).strip()):
                continue
            text = parse_json_line(row, f"{where} line {lines.line_number}", options).encode()
            del row
        del line  # while the story is tokenized, it is in memory only once
        yield text


def parse_json_line(text: str, where: str, options: ReadOptions) -> str:
    """Return the text field of a JSON line. Raises `UserError` if the line, or the field, is not valid."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else sanitize(error)
        raise UserError(f"{where}: invalid JSON: {reason}; fix or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with the field {options.text_field!r}")
    return get_text_field(row, where, options)


def get_text_field(row: dict[str, Any], where: str, options: ReadOptions) -> str:
    """Return the text field of a JSON object (null: empty). Raises `UserError` if it is missing or not valid text."""
    if options.text_field not in row:
        raise UserError(missing_field_message(where, options, row))
    value = row[options.text_field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {options.text_field!r} is {type(value).__name__}, not text")
    if value is None or value.isascii():
        return value or ""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON escapes can contain an unpaired surrogate
        if options.errors == "strict":
            raise UserError(f"{where}: {sanitize(error)}; pass --errors replace to substitute U+FFFD") from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def missing_field_message(where: str, options: ReadOptions, names: Iterable[str]) -> str:
    columns = list_names(names)
    return f"{where}: no column {options.text_field!r}; columns: {columns}; choose one with --text-field"


def read_csv(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Yield batches of a CSV file (RFC 4180) with a header line. `position` is [byte offset, number of lines read]."""
    csv.field_size_limit(MAX_STORY_BYTES)  # a process-wide setting, csv offers no other; the default is 128 KB
    lines = LineReader(where, file, None)
    header = next(parse_csv_rows(where, lines, options), [])
    columns = [name.decode() if isinstance(name, bytes) else name for name in header]
    if options.text_field not in columns:
        raise UserError(missing_field_message(where, options, columns))
    lines = LineReader(where, file, position or lines.position)
    yield from batch_texts(parse_csv(where, lines, columns, options), lines)


def parse_csv(where: str, lines: "LineReader", columns: list[str], options: ReadOptions) -> Iterator[bytes]:
    """Yield the text column of each row. Raises `UserError` if a row has more or fewer fields than the header."""
    column = columns.index(options.text_field)
    for row in parse_csv_rows(where, lines, options):
        if row and len(row) != len(columns):  # a blank line is not a row
            raise UserError(
                f"{where} line {lines.line_number}: {len(row)} fields, but the header has {len(columns)};"
                ' put fields that contain commas in quotes: "..."'
            )
        if row:
            text = row[column]
            yield text.encode() if isinstance(text, str) else text


def parse_csv_rows(where: str, lines: "LineReader", options: ReadOptions) -> Iterator[list[str] | list[bytes]]:
    """Yield the fields of each row; those of a long row in UTF-8.

    Raises `UserError` with the number of the line on which a broken row starts.
    """
    first_line = lines.line_number + 1  # a quoted field may span several lines
    start: list[bytes] = []  # the lines of the row that have been read
    try:
        rows = csv.reader(short_rows(where, lines, options, start), strict=True)
        while True:
            row: list[str] | list[bytes] | None
            try:
                row = next(rows, None)
            except LongRow:
                texts = (check_text(where, line, options, lines.start_offset) for line in itertools.chain(start, lines))
                row = parse_csv_row(texts, MAX_STORY_BYTES)
                rows = csv.reader(short_rows(where, lines, options, start), strict=True)
            if row is None:
                return
            start.clear()
            yield row
            first_line = lines.line_number + 1
    except csv.Error as error:
        raise UserError(f"{where} line {first_line}: invalid CSV: {sanitize(error)}; fix the row") from None


class LongRow(Exception):
    """A row of a CSV file is longer than LONG_ROW_BYTES."""


def short_rows(where: str, lines: "LineReader", options: ReadOptions, start: list[bytes]) -> Iterator[str]:
    """Yield lines for `csv.reader`, and append them to `start`, which the caller clears after every row.

    Raises `LongRow` instead of yielding the line with which a row becomes long.
    """
    size = 0
    for line in lines:
        size = size + len(line) if start else len(line)
        start.append(line)
        if size > LONG_ROW_BYTES:
            raise LongRow
        yield decode_text(where, line, options, lines.start_offset)


class LineReader:
    """Iterates over the lines of a file; a `Cursor` that knows the byte offset and number of the current line."""

    def __init__(self, where: str, file: BinaryIO, position: Any) -> None:
        self.where, self.file = where, file
        self.end_offset: int
        self.line_number: int
        self.end_offset, self.line_number = position or (skip_bom(file), 0)
        self.start_offset = self.end_offset
        file.seek(self.end_offset)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:  # not a generator, which would keep a long line
        if not (line := self.file.readline(MAX_STORY_BYTES)):
            raise StopIteration
        self.start_offset = self.end_offset
        self.end_offset += len(line)
        self.line_number += 1
        if len(line) == MAX_STORY_BYTES:
            raise UserError(
                f"{self.where} line {self.line_number}: longer than {MAX_STORY_BYTES >> 20} MB; put one story per line"
            )
        return line

    @property
    def position(self) -> list[int]:
        """[byte offset after the current line, number of lines read]."""
        return [self.end_offset, self.line_number]

    @property
    def bytes_read(self) -> int:
        return self.end_offset


def batch_texts(texts: Iterable[bytes], cursor: Cursor) -> Iterator[StoryBatch]:
    """Strip texts, normalize newlines, and group them into batches of BATCH_BYTES or more; `cursor` follows `texts`."""
    stories: list[bytes] = []
    n_empty, bytes_before, size = 0, cursor.bytes_read, 0
    for text in texts:
        if story := text.replace(b"\r\n", b"\n").strip():
            stories.append(story)
            size += len(story)
        else:
            n_empty += 1
        if size >= BATCH_BYTES:
            del text, story  # a long story is not kept in memory twice
            yield StoryBatch(stories, n_empty, cursor.position, cursor.bytes_read - bytes_before)
            stories, n_empty, bytes_before, size = [], 0, cursor.bytes_read, 0
    yield StoryBatch(stories, n_empty, cursor.position, cursor.bytes_read - bytes_before)


def decode_text(where: str, data: bytes, options: ReadOptions, start: int = 0) -> str:
    """Decode UTF-8. In strict mode, raises `UserError` with the byte offset, where `start` is the offset of `data`."""
    try:
        return data.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise UserError(not_utf8_message(where, error, start)) from None


def check_text(where: str, data: bytes, options: ReadOptions, start: int = 0) -> bytes:
    """Return text that is UTF-8 as it is, and other text as `decode_text` decodes it, encoded again."""
    try:
        return repair_utf8(data, options.errors)
    except UnicodeDecodeError as error:
        raise UserError(not_utf8_message(where, error, start)) from None


def not_utf8_message(where: str, error: UnicodeDecodeError, start: int) -> str:
    return (
        f"{where}: byte {start + error.start} (0x{error.object[error.start]:02x}) is not UTF-8;"
        " convert the file (from Windows-1252 or Latin-1: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW),"
        " or pass --errors replace to substitute U+FFFD"
    )


def skip_bom(file: BinaryIO) -> int:
    """Return the byte offset at which the text of a file starts: after the byte-order mark, if any."""
    return len(BOM) if file.read(len(BOM)) == BOM else 0
