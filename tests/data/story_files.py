"""Write story files in every format, for the tests."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tinystories.data.tokenizer import END


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_txt(path: Path, texts: Sequence[str]) -> Path:
    return put(path, "".join(f"{text}\n{END}\n" for text in texts).encode())


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    return put(path, "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode())


def write_csv(path: Path, texts: Sequence[str]) -> Path:
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    return put(path, out.getvalue().encode())


def write_parquet(path: Path, texts: Sequence[str]) -> Path:
    parquet.write_table(pa.table({"id": range(len(texts)), "text": list(texts)}), path, row_group_size=70)
    return path
