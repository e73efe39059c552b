"""Stories out of a text column of Arrow tables: parquet files, and what `datasets` streams."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from tinystories.data.reader import ReadOptions, StoryBatch, batch_texts, decode_text, missing_field_message
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError

ROWS_PER_BATCH = 1024  # per table: what is held in memory at a time


def read_parquet(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """A column of text. `position` is the number of a row."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{where}: reading parquet needs pyarrow: pip install 'tinystories-gpt[train]'") from None
    try:
        with parquet.ParquetFile(file) as parquet_file:
            select_text_column(where, parquet_file.schema_arrow.empty_table(), options)
            rows = ParquetRows(where, parquet_file, options, position or 0)
            yield from batch_texts(rows, rows)
    except pa.ArrowException as error:
        raise UserError(f"{where} is no whole parquet file: {sanitize(error)}; get it again") from None


class ParquetRows:
    """The texts of a parquet file and how many rows of it were read."""

    def __init__(self, where: str, file: Any, options: ReadOptions, position: int) -> None:
        self.where, self.file, self.options = where, file, options
        self.position = position
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        first_row = 0  # number of the next group's, then of the next table's first row
        for group in range(self.file.num_row_groups):
            n_rows = self.file.metadata.row_group(group).num_rows
            if first_row + n_rows <= self.position:
                first_row += n_rows
                continue
            for table in self.file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=[self.options.text_field]):
                for value in select_text_column(self.where, table, self.options)[max(0, self.position - first_row) :]:
                    data = value.as_py() or b""
                    self.position += 1
                    self.bytes_read += len(data)
                    yield decode_text(f"{self.where} row {self.position - 1}", data, self.options)
                first_row += table.num_rows


def select_text_column(where: str, table: Any, options: ReadOptions) -> Any:
    """The chosen column of an Arrow table or record batch as bytes: Arrow does not check that text is UTF-8."""
    import pyarrow as pa

    if options.text_field not in table.schema.names:
        raise UserError(missing_field_message(where, options, table.schema.names))
    column = table.column(options.text_field)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UserError(f"{where}: column {options.text_field!r} holds {column.type}, not text")
    return column.cast(pa.large_binary())
