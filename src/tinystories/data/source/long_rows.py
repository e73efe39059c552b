"""Rows of .jsonl and .csv that hold a long story, parsed as bytes: `json` and `csv` take up to 12 bytes per byte.

Python decodes a text with an emoji to four bytes per character, and `csv` collects every field like that.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator

LONG_ROW_BYTES = 1 << 20  # longer rows are parsed here
PIECE_BYTES = 1 << 20  # decoded at a time
# Where a JSON string may be cut: before a character that is not part of an escape, or before \uXXXX unless that is the
# second half of a surrogate pair.
JSON_CUT = re.compile(rb"(?=[ ,.\xc2-\xf4])|(?<!\\)(?=\\u(?![dD][c-fC-F]))")
# What follows a field of a CSV row.
FIELD_END = re.compile(rb"[,\r\n]|\Z")


def repair_utf8(data: bytes, errors: str) -> bytes:
    """Return UTF-8 as it is, and with errors="replace" U+FFFD for what is not; otherwise raise UnicodeDecodeError.

    The error has the offset in `data`. The result is `data` itself if nothing had to be replaced.
    """
    if data.isascii():
        return data
    pieces: list[memoryview | bytes] = []
    view, start, is_valid = memoryview(data), 0, True
    while start < len(data):
        piece = view[start : start + PIECE_BYTES]
        is_last = start + len(piece) == len(data)  # otherwise its last character may be incomplete, and is left over
        try:
            _, size = codecs.utf_8_decode(piece, "strict", is_last)
            pieces.append(piece[:size])
        except UnicodeDecodeError as error:
            if errors == "strict":
                raise UnicodeDecodeError(
                    error.encoding, data, start + error.start, start + error.end, error.reason
                ) from None
            text, size = codecs.utf_8_decode(piece, errors, is_last)
            pieces.append(text.encode())
            is_valid = False
        start += size
    return data if is_valid else b"".join(pieces)


def extract_json_text(line: bytes, field: str, errors: str) -> bytes | None:
    """Return the text in a field of a JSON object, in UTF-8; None if `json` has to parse the whole line.

    That is so if no string of the line is long, and for anything invalid: `json` then gives the reason.
    """
    spans = list(find_long_strings(line))
    skeleton, end = [], 0
    for start, next_end in spans:
        skeleton.append(line[end : start - 1])
        end = next_end + 1
    skeleton.append(line[end:])
    # Each long string is replaced by NaN, for which json calls `parse_constant`, in the order of the text.
    if not spans or any(b"NaN" in part for part in skeleton):
        return None
    remaining = iter(spans)
    try:
        row = json.loads(
            b"NaN".join(skeleton).decode(), parse_constant=lambda name: next(remaining) if name == "NaN" else None
        )
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(value, tuple):
            start, end = value
            return b"".join(decode_json_string(line, start, end, errors))
        return value.encode() if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def find_long_strings(line: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and end of the content of each string of a JSON text that is longer than PIECE_BYTES."""
    start = line.find(b'"') + 1
    while start:
        end = line.find(b'"', start)
        while end > 0 and is_escaped(line, end):
            end = line.find(b'"', end + 1)
        if end < 0:
            return
        if end - start > PIECE_BYTES:
            yield start, end
        start = line.find(b'"', end + 1) + 1


def is_escaped(line: bytes, at: int) -> bool:
    """Whether an odd number of backslashes precedes a character of a JSON string."""
    start = at
    while line[start - 1] == ord("\\"):
        start -= 1
    return (at - start) % 2 == 1


def decode_json_string(line: bytes, start: int, end: int, errors: str) -> Iterator[bytes]:
    """Yield the content of a JSON string in UTF-8. ValueError if it is invalid or, unless replaced, has half a pair."""
    while start < end:
        match = JSON_CUT.search(line, start + PIECE_BYTES, end) if end - start > PIECE_BYTES else None
        stop = match.start() if match else end
        text: str = json.loads(f'"{line[start:stop].decode()}"')
        try:
            yield text.encode()
        except UnicodeEncodeError:
            if errors == "strict":
                raise
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        start = stop


def parse_csv_row(lines: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """Return the fields of the row that starts with the first line, as `csv.reader(strict=True)` does, in UTF-8.

    Takes no more lines than the row has. Raises `csv.Error` for an invalid row, and for a field of more than
    `max_bytes`.
    """
    fields: list[bytes] = []
    field = bytearray()  # the part of a field in quotes that has been read
    is_quoted = False
    for line in lines:
        at = 0
        if not fields and not is_quoted and not line.strip(b"\r\n"):
            return []
        while True:
            if not is_quoted and line[at : at + 1] == b'"':
                is_quoted, at = True, at + 1
            if is_quoted:
                quote = line.find(b'"', at)
                is_doubled = line[quote + 1 : quote + 2] == b'"'
                end = len(line) if quote < 0 else quote + is_doubled
                field += memoryview(line)[at:end]
                if len(field) > max_bytes:
                    raise csv.Error(f"field larger than field limit ({max_bytes})")
                if quote < 0:
                    break  # the field continues in the next line
                at = quote + 1 + is_doubled
                if is_doubled:
                    continue
                is_quoted = False
                fields.append(bytes(field))
                field = bytearray()
                end = at
            else:
                match = FIELD_END.search(line, at)
                assert match is not None, "a line has an end"
                end = match.start()
                fields.append(line[at:end])
            if line[end : end + 1] == b",":
                at = end + 1
                continue
            if line[end:].strip(b"\r\n"):
                is_line_end = line[end : end + 1] in (b"\r", b"\n")
                raise csv.Error(
                    "new-line character seen in unquoted field" if is_line_end else "',' expected after '\"'"
                )
            return fields
    raise csv.Error("unexpected end of data")
