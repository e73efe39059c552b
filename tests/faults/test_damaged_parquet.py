"""A damaged parquet file is one line: also where pyarrow would end the process, and where the line could be long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinystories.data.source.reader import ReadOptions, missing_field_message
from tinystories.errors import UserError, list_names

# Flips each bit of the metadata at the end of a file and reads the file. An exception of C++ that pyarrow does not
# expect would end this process.
READ_ALL_DAMAGED = """
import io, sys
import pyarrow as pa
from pyarrow import parquet
from tinystories.data.source.arrow import read_parquet
from tinystories.data.source.reader import ReadOptions
from tinystories.errors import UserError

file = io.BytesIO()
parquet.write_table(pa.table({"text": ["Once upon a time."]}), file, store_schema=False, compression="none")
good = file.getvalue()
footer_size = int.from_bytes(good[-8:-4], "little")
counts = {"read": 0, "refused": 0}
for i in range(len(good) - 8 - footer_size, len(good) - 8):
    for bit in range(8):
        damaged = bytearray(good)
        damaged[i] ^= 1 << bit
        try:
            list(read_parquet("a.parquet", io.BytesIO(damaged), ReadOptions()))
            counts["read"] += 1
        except (UserError, OSError):  # files.py explains an OSError
            counts["refused"] += 1
print(counts["read"], counts["refused"])
"""


def test_no_flipped_bit_of_the_metadata_ends_the_process() -> None:
    pytest.importorskip("pyarrow")
    completed = subprocess.run(
        [sys.executable, "-c", READ_ALL_DAMAGED], capture_output=True, text=True, check=False, timeout=300
    )
    assert completed.returncode == 0, completed.stderr[-500:]
    n_read, n_refused = map(int, completed.stdout.split())
    assert n_read
    assert n_refused


@pytest.mark.parametrize("name", ["A" * 20_000, "\x1b[2J" * 5_000])
def test_a_long_name_of_a_field(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({name: "Once upon a time."}) + "\n")
    command = [
        sys.executable,
        "-m",
        "tinystories",
        "prepare",
        path,
        "--tokenizer",
        "bpe:300",
        "--out",
        tmp_path / "out",
    ]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = completed.stderr.splitlines()
    assert completed.returncode == 2
    assert line.startswith("error: ")
    assert "no column 'text'" in line
    assert len(line) < 1000
    assert line.isprintable()


def test_a_table_of_many_columns_names_ten() -> None:
    names = [f"column{i}" for i in range(5000)]
    assert list_names(names).endswith("column9, ... (5000 in all)")
    assert list_names(names[:10]) == ", ".join(names[:10])
    assert list_names([]) == "none"
    assert len(str(UserError(missing_field_message("a.csv", ReadOptions(), names)))) < 1000
