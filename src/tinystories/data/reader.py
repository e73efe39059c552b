"""Stories out of .txt, .jsonl and .csv: batches in constant memory, each with the position where reading can resume."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from tinystories.data.tokenizer import END, sanitize
from tinystories.errors import UserError

DecodeErrors = Literal["strict", "replace"]

BATCH_BYTES = (
    4 << 20
)  # of text; enough to keep all cores busy, little enough to stay in the caches and in a small memory
MAX_STORY_BYTES = 64 << 20  # longest story, line or field; more is taken for a broken file
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class ReadOptions:
    text_field: str = "text"
    errors: DecodeErrors = "strict"


@dataclasses.dataclass(frozen=True, slots=True)
class StoryBatch:
    """Some stories in UTF-8: stripped of ASCII white space, with plain newlines, none empty.

    Bytes, because a batch is hashed, measured and tokenised as bytes. `position` (plain JSON) is where the next begins.
    """

    stories: list[bytes]
    n_empty: int  # stories dropped because nothing was in them
    position: Any
    bytes_read: int  # bytes of the source behind this batch


@runtime_checkable
class Cursor(Protocol):
    """How far reading has come."""

    @property
    def position(self) -> Any: ...

    @property
    def bytes_read(self) -> int:
        """Bytes since the start of the file."""


def read_txt(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Stories with END after (or between) them. `position` is the byte offset behind an END."""
    start: int = position or skip_bom(file)
    file.seek(start)
    remainder, found_separator = b"", position is not None
    while chunk := file.read(BATCH_BYTES):
        *pieces, remainder = (remainder + chunk).split(END.encode())
        if pieces:
            batch = parse_txt_batch(where, pieces, start, options)
            yield batch
            start, found_separator = batch.position, True
        elif len(remainder) > MAX_STORY_BYTES:
            raise UserError(missing_separator_message(where, f"the {MAX_STORY_BYTES >> 20} MB from byte {start} on"))
    if not found_separator:
        raise UserError(missing_separator_message(where, "the whole file"))
    if remainder.strip():  # a last story without its END
        yield dataclasses.replace(parse_txt_batch(where, [remainder], start, options), position=start + len(remainder))


def parse_txt_batch(where: str, pieces: list[bytes], start: int, options: ReadOptions) -> StoryBatch:
    """The stories in what stands before each END, from byte `start` of the file."""
    stories = [story for piece in pieces if (story := piece.strip())]
    for number, story in enumerate(stories):
        if not story.isascii() or b"\r" in story:
            try:
                story.decode()
            except UnicodeDecodeError:
                decode_text(
                    where, END.encode().join(pieces), options, start
                )  # raises with the place, unless to replace
                story = story.decode("utf-8", "replace").encode()
            stories[number] = story.replace(b"\r\n", b"\n")
    size = sum(map(len, pieces)) + len(END) * len(pieces)
    return StoryBatch(stories, len(pieces) - len(stories), start + size, size)


def missing_separator_message(where: str, part: str) -> str:
    return f"{where}: no {END} in {part}; put a line {END} after every story (a single one needs it too), or use .jsonl"


def read_jsonl(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """One JSON object per line. `position` is [byte offset, line number]."""
    lines = LineReader(where, file, position)
    yield from batch_texts(parse_jsonl(where, lines, options), lines)


def parse_jsonl(where: str, lines: "LineReader", options: ReadOptions) -> Iterator[str]:
    for line in lines:
        if not (text := decode_text(where, line, options, lines.start_offset).strip()):
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else sanitize(error)
            )
            raise UserError(
                f"{where} line {lines.line_number}: broken JSON: {reason}; mend or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where} line {lines.line_number}: expected a JSON object with the field {options.text_field!r}"
            )
        yield get_text_field(row, f"{where} line {lines.line_number}", options)


def get_text_field(row: dict[str, Any], where: str, options: ReadOptions) -> str:
    """The text field of a row; null counts as empty."""
    if options.text_field not in row:
        raise UserError(missing_field_message(where, options, row))
    value = row[options.text_field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {options.text_field!r} is {type(value).__name__}, not text")
    if value is None or value.isascii():
        return value or ""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
        if options.errors == "strict":
            raise UserError(f"{where}: {sanitize(error)}; --errors replace puts U+FFFD in its place") from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def missing_field_message(where: str, options: ReadOptions, names: Iterable[str]) -> str:
    known_names = ", ".join(names) or "none"
    return f"{where}: no column {options.text_field!r}; columns: {known_names}; choose one by --text-field"


def read_csv(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """A header line, then one story per row (RFC 4180). `position` is [byte offset, line number]."""
    csv.field_size_limit(MAX_STORY_BYTES)  # for the whole process, csv knows no other way; the default is 128 KB
    lines = LineReader(where, file, None)
    columns = next(parse_csv_rows(where, lines, options), [])
    if options.text_field not in columns:
        raise UserError(missing_field_message(where, options, columns))
    lines = LineReader(where, file, position or lines.position)
    yield from batch_texts(parse_csv(where, lines, columns, options), lines)


def parse_csv(where: str, lines: "LineReader", columns: list[str], options: ReadOptions) -> Iterator[str]:
    column = columns.index(options.text_field)
    for row in parse_csv_rows(where, lines, options):
        if row and len(row) != len(columns):  # a blank line is no row
            raise UserError(
                f"{where} line {lines.line_number}: {len(row)} fields, but the header has {len(columns)};"
                ' write fields that hold commas in quotes: "..."'
            )
        if row:
            yield row[column]


def parse_csv_rows(where: str, lines: "LineReader", options: ReadOptions) -> Iterator[list[str]]:
    first_line = lines.line_number + 1  # line of the row; a quoted field may hold more lines
    try:
        for row in csv.reader((decode_text(where, line, options, lines.start_offset) for line in lines), strict=True):
            yield row
            first_line = lines.line_number + 1
    except csv.Error as error:
        raise UserError(f"{where} line {first_line}: broken CSV: {sanitize(error)}; mend the row") from None


class LineReader:
    """The lines of a file, with the place of the last one given out."""

    def __init__(self, where: str, file: BinaryIO, position: Any) -> None:
        self.where, self.file = where, file
        self.end_offset: int
        self.line_number: int
        self.end_offset, self.line_number = position or (skip_bom(file), 0)
        self.start_offset = self.end_offset
        file.seek(self.end_offset)

    def __iter__(self) -> Iterator[bytes]:
        while line := self.file.readline(MAX_STORY_BYTES):
            self.start_offset = self.end_offset
            self.end_offset += len(line)
            self.line_number += 1
            if len(line) == MAX_STORY_BYTES:
                raise UserError(
                    f"{self.where} line {self.line_number}: longer than {MAX_STORY_BYTES >> 20} MB; one story a line"
                )
            yield line

    @property
    def position(self) -> list[int]:
        return [self.end_offset, self.line_number]

    @property
    def bytes_read(self) -> int:
        return self.end_offset


def batch_texts(texts: Iterable[str], cursor: Cursor) -> Iterator[StoryBatch]:
    """Texts cleaned and put together to batches of about BATCH_BYTES."""
    stories: list[bytes] = []
    n_empty, bytes_before, size = 0, cursor.bytes_read, 0
    for text in texts:
        if story := text.encode().replace(b"\r\n", b"\n").strip():
            stories.append(story)
            size += len(story)
        else:
            n_empty += 1
        if size >= BATCH_BYTES:
            yield StoryBatch(stories, n_empty, cursor.position, cursor.bytes_read - bytes_before)
            stories, n_empty, bytes_before, size = [], 0, cursor.bytes_read, 0
    yield StoryBatch(stories, n_empty, cursor.position, cursor.bytes_read - bytes_before)


def decode_text(where: str, data: bytes, options: ReadOptions, start: int = 0) -> str:
    """`data`, which begins at byte `start` of what `where` names, as text."""
    try:
        return data.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{where}: byte {start + error.start} (0x{byte:02x}) is not UTF-8;"
            " mend it, or put U+FFFD in its place by --errors replace"
        ) from None


def skip_bom(file: BinaryIO) -> int:
    """Where the text of a file begins."""
    return len(BOM) if file.read(len(BOM)) == BOM else 0
