"""Stories out of a text column of Arrow tables: parquet files, and what `datasets` streams."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from tinystories.data.reader import Batch, ReadOptions, batches, decoded, no_field
from tinystories.data.tokenizer import one_line
from tinystories.errors import UserError

ROWS = 1024  # per table: what is held in memory at a time


def read_parquet(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
    """A column of text. `position` is the number of a row."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{where}: reading parquet needs pyarrow: pip install 'tinystories-gpt[train]'") from None
    try:
        with parquet.ParquetFile(file) as table_file:
            text_column(where, table_file.schema_arrow.empty_table(), options)
            rows = ParquetRows(where, table_file, options, position or 0)
            yield from batches(rows, rows)
    except pa.ArrowException as error:
        raise UserError(f"{where} is no whole parquet file: {one_line(error)}; get it again") from None


class ParquetRows:
    """The texts of a parquet file and how many rows of it were read."""

    def __init__(self, where: str, file: Any, options: ReadOptions, position: int) -> None:
        self.where, self.file, self.options = where, file, options
        self.position = position
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        first = 0  # number of the next group's, then of the next table's first row
        for group in range(self.file.num_row_groups):
            rows = self.file.metadata.row_group(group).num_rows
            if first + rows <= self.position:
                first += rows
                continue
            for table in self.file.iter_batches(ROWS, row_groups=[group], columns=[self.options.text_field]):
                for value in text_column(self.where, table, self.options)[max(0, self.position - first) :]:
                    data = value.as_py() or b""
                    self.position += 1
                    self.read += len(data)
                    yield decoded(f"{self.where} row {self.position - 1}", data, self.options)
                first += table.num_rows


def text_column(where: str, table: Any, options: ReadOptions) -> Any:
    """The chosen column of an Arrow table or record batch as bytes: Arrow does not check that text is UTF-8."""
    import pyarrow as pa

    if options.text_field not in table.schema.names:
        raise UserError(no_field(where, options, table.schema.names))
    column = table.column(options.text_field)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UserError(f"{where}: column {options.text_field!r} holds {column.type}, not text")
    return column.cast(pa.large_binary())
