"""Open a story file by its content: decompress gzip, bzip2 and xz, and name what cannot be read, with the cure."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError

HEAD_BYTES = 512  # bytes from the start of a file that identify its content
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")  # after the suffix of the format: stories.jsonl.gz

# First bytes, what they mean, and the command that makes a readable file of it.
UNREADABLE = (
    (b"version https://git-lfs.github.com/", "is a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard, which is not supported", "zstd -d FILE"),
    (b"PK\x03\x04", "is a zip archive, which is not supported", "unzip FILE"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive, which is not supported", "7z x FILE"),
    (b"Rar!\x1a\x07", "is a RAR archive, which is not supported", "unrar x FILE"),
    (b"\xff\xfe\0\0", "is UTF-32 text, not UTF-8", "iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\0\0\xfe\xff", "is UTF-32 text, not UTF-8", "iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "is UTF-16 text, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "is UTF-16 text, not UTF-8", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
)
PARQUET_MAGIC = b"PAR1"


def get_format(path: Path) -> str:
    """Return the suffix that names the format of a story file, in lower case and without that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


@contextlib.contextmanager
def open_story_file(path: Path, where: str) -> Iterator[BinaryIO]:
    """Open a story file for reading, decompressed if its first bytes are those of gzip, bzip2 or xz; it is seekable.

    `where` names it in errors. Raises `UserError` for a file that cannot be opened, for content that is not supported,
    and inside the block for compressed data that is damaged.
    """
    try:
        with path.open("rb") as raw:
            file = decompress(raw)
            check_head(where, read_head(file), is_parquet=get_format(path) == ".parquet", is_compressed=file is not raw)
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{where} is damaged or incomplete: {sanitize(error)}; download it again") from None
    except OSError as error:
        if error.errno is None:  # gzip and bz2 report damaged data like this
            raise UserError(f"{where} is damaged or incomplete: {sanitize(error)}; download it again") from None
        raise UserError(f"{where} cannot be read: {error.strerror}") from None


def decompress(raw: BinaryIO) -> BinaryIO:
    """Return a file with the decompressed content of `raw`, or `raw` itself if it is not compressed."""
    head = read_head(raw)
    if head.startswith(b"\x1f\x8b\x08"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # has all methods of a binary file
    if head.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(lzma.LZMAFile(raw))
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return io.BufferedReader(bz2.BZ2File(raw))
    return raw


def read_head(file: BinaryIO) -> bytes:
    """Return the first bytes of a seekable file, which is then at its start."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def is_compressed(path: Path) -> bool:
    """Whether the size of the text in a file is unknown before it is decompressed."""
    with path.open("rb") as raw:
        return decompress(raw) is not raw


def check_head(where: str, head: bytes, *, is_parquet: bool, is_compressed: bool) -> None:
    """Raise `UserError`, with the cure, if the first bytes of a (decompressed) file show that it cannot be read."""
    for magic, problem, command in UNREADABLE:
        if head.startswith(magic):
            raise UserError(f"{where} {problem}; run: {command}")
    if head[257:262] == b"ustar":
        raise UserError(f"{where} is a tar archive, which is not supported; run: tar -xf FILE")
    if is_parquet and is_compressed:
        raise UserError(f"{where} is a compressed parquet file; decompress it first")
    if head.startswith(PARQUET_MAGIC) and not is_parquet:
        raise UserError(f"{where} is a parquet file; rename it to NAME.parquet")
    # ASCII characters are every second byte of UTF-16, the others are zero; a byte-order mark may be missing.
    for encoding, first_zero in (("UTF-16BE", 0), ("UTF-16LE", 1)):
        if not is_parquet and head[first_zero::2].count(0) > len(head) // 4:
            raise UserError(f"{where} is {encoding} text, not UTF-8; run: iconv -f {encoding} -t UTF-8 FILE > NEW")
