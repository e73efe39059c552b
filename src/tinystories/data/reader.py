"""Stories out of .txt, .jsonl and .csv: batches in constant memory, each with the position where reading can resume."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from tinystories.data.tokenizer import END, one_line
from tinystories.errors import UserError

Errors = Literal["strict", "replace"]

BATCH_BYTES = (
    4 << 20
)  # of text; enough to keep all cores busy, little enough to stay in the caches and in a small memory
STORY_BYTES = 64 << 20  # longest story, line or field; more is taken for a broken file
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class ReadOptions:
    text_field: str = "text"
    errors: Errors = "strict"


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Some stories in UTF-8: stripped of ASCII white space, with plain newlines, none empty.

    Bytes, because a batch is hashed, measured and tokenised as bytes. `position` (plain JSON) is where the next begins.
    """

    stories: list[bytes]
    empty: int  # stories dropped because nothing was in them
    position: Any
    read: int  # bytes of the source behind this batch


@runtime_checkable
class Cursor(Protocol):
    """How far reading has come."""

    @property
    def position(self) -> Any: ...

    @property
    def read(self) -> int:
        """Bytes since the start of the file."""


def read_txt(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
    """Stories with END after (or between) them. `position` is the byte offset behind an END."""
    start: int = position or skip_bom(file)
    file.seek(start)
    rest, separated = b"", position is not None
    while chunk := file.read(BATCH_BYTES):
        *pieces, rest = (rest + chunk).split(END.encode())
        if pieces:
            batch = txt_batch(where, pieces, start, options)
            yield batch
            start, separated = batch.position, True
        elif len(rest) > STORY_BYTES:
            raise UserError(no_separator(where, f"the {STORY_BYTES >> 20} MB from byte {start} on"))
    if not separated:
        raise UserError(no_separator(where, "the whole file"))
    if rest.strip():  # a last story without its END
        yield dataclasses.replace(txt_batch(where, [rest], start, options), position=start + len(rest))


def txt_batch(where: str, pieces: list[bytes], start: int, options: ReadOptions) -> Batch:
    """The stories in what stands before each END, from byte `start` of the file."""
    stories = [story for piece in pieces if (story := piece.strip())]
    for number, story in enumerate(stories):
        if not story.isascii() or b"\r" in story:
            try:
                story.decode()
            except UnicodeDecodeError:
                decoded(where, END.encode().join(pieces), options, start)  # raises with the place, unless to replace
                story = story.decode("utf-8", "replace").encode()
            stories[number] = story.replace(b"\r\n", b"\n")
    size = sum(map(len, pieces)) + len(END) * len(pieces)
    return Batch(stories, len(pieces) - len(stories), start + size, size)


def no_separator(where: str, part: str) -> str:
    return f"{where}: no {END} in {part}; put a line {END} after every story (a single one needs it too), or use .jsonl"


def read_jsonl(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
    """One JSON object per line. `position` is [byte offset, line number]."""
    lines = Lines(where, file, position)
    yield from batches(jsonl_texts(where, lines, options), lines)


def jsonl_texts(where: str, lines: "Lines", options: ReadOptions) -> Iterator[str]:
    for line in lines:
        if not (text := decoded(where, line, options, lines.start).strip()):
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)
            )
            raise UserError(f"{where} line {lines.number}: broken JSON: {what}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{where} line {lines.number}: expected a JSON object with the field {options.text_field!r}"
            )
        yield field_of(row, f"{where} line {lines.number}", options)


def field_of(row: dict[str, Any], where: str, options: ReadOptions) -> str:
    """The text field of a row; null counts as empty."""
    if options.text_field not in row:
        raise UserError(no_field(where, options, row))
    value = row[options.text_field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {options.text_field!r} is {type(value).__name__}, not text")
    if value is None or value.isascii():
        return value or ""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
        if options.errors == "strict":
            raise UserError(f"{where}: {one_line(error)}; --errors replace puts U+FFFD in its place") from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def no_field(where: str, options: ReadOptions, names: Iterable[str]) -> str:
    known = ", ".join(names) or "none"
    return f"{where}: no column {options.text_field!r}; columns: {known}; choose one by --text-field"


def read_csv(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
    """A header line, then one story per row (RFC 4180). `position` is [byte offset, line number]."""
    csv.field_size_limit(STORY_BYTES)  # for the whole process, csv knows no other way; the default is 128 KB
    lines = Lines(where, file, None)
    columns = next(csv_rows(where, lines, options), [])
    if options.text_field not in columns:
        raise UserError(no_field(where, options, columns))
    lines = Lines(where, file, position or lines.position)
    yield from batches(csv_texts(where, lines, columns, options), lines)


def csv_texts(where: str, lines: "Lines", columns: list[str], options: ReadOptions) -> Iterator[str]:
    column = columns.index(options.text_field)
    for row in csv_rows(where, lines, options):
        if row and len(row) != len(columns):  # a blank line is no row
            raise UserError(
                f"{where} line {lines.number}: {len(row)} fields, but the header has {len(columns)};"
                ' write fields that hold commas in quotes: "..."'
            )
        if row:
            yield row[column]


def csv_rows(where: str, lines: "Lines", options: ReadOptions) -> Iterator[list[str]]:
    first = lines.number + 1  # line of the row; a quoted field may hold more lines
    try:
        for row in csv.reader((decoded(where, line, options, lines.start) for line in lines), strict=True):
            yield row
            first = lines.number + 1
    except csv.Error as error:
        raise UserError(f"{where} line {first}: broken CSV: {one_line(error)}; mend the row") from None


class Lines:
    """The lines of a file, with the place of the last one given out."""

    def __init__(self, where: str, file: BinaryIO, position: Any) -> None:
        self.where, self.file = where, file
        self.end: int
        self.number: int
        self.end, self.number = position or (skip_bom(file), 0)
        self.start = self.end
        file.seek(self.end)

    def __iter__(self) -> Iterator[bytes]:
        while line := self.file.readline(STORY_BYTES):
            self.start = self.end
            self.end += len(line)
            self.number += 1
            if len(line) == STORY_BYTES:
                raise UserError(
                    f"{self.where} line {self.number}: longer than {STORY_BYTES >> 20} MB; one story a line"
                )
            yield line

    @property
    def position(self) -> list[int]:
        return [self.end, self.number]

    @property
    def read(self) -> int:
        return self.end


def batches(texts: Iterable[str], cursor: Cursor) -> Iterator[Batch]:
    """Texts cleaned and put together to batches of about BATCH_BYTES."""
    stories: list[bytes] = []
    empty, before, size = 0, cursor.read, 0
    for text in texts:
        if story := text.encode().replace(b"\r\n", b"\n").strip():
            stories.append(story)
            size += len(story)
        else:
            empty += 1
        if size >= BATCH_BYTES:
            yield Batch(stories, empty, cursor.position, cursor.read - before)
            stories, empty, before, size = [], 0, cursor.read, 0
    yield Batch(stories, empty, cursor.position, cursor.read - before)


def decoded(where: str, data: bytes, options: ReadOptions, start: int = 0) -> str:
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
