"""Read stories from a text column of Arrow tables: parquet files, and the streams of `datasets`."""

from collections.abc import Generator, Iterator
from typing import Any, BinaryIO

from tinystories.data.source.reader import ReadOptions, StoryBatch, batch_texts, check_text, missing_field_message
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError, list_names

ROWS_PER_BATCH = 1024  # rows per Arrow table, i.e. held in memory at a time, unless they are long
TABLE_BYTES = 64 << 20  # of an Arrow table, on average
LONG_TEXT_BYTES = 16 << 20


def read_parquet(where: str, file: BinaryIO, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
    """Yield the stories of one text column in batches.

    `where` names the file in errors. `position` is the number of the row to resume from.
    Raises `UserError` if pyarrow is missing, the column does not exist, or the file is truncated or corrupt.
    """
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
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter: a damaged column name
        raise UserError(f"{where} is not a complete parquet file: {sanitize(error)}; download it again") from None


class ParquetRows:
    """Iterates over the texts of a parquet file from row `position` on; a `Cursor` that counts rows and bytes."""

    def __init__(self, where: str, file: Any, options: ReadOptions, position: int) -> None:
        self.where, self.file, self.options = where, file, options
        self.position = position
        self.bytes_read = 0

    def __iter__(self) -> Iterator[bytes]:
        first_row = 0  # number of the first row of the next row group
        for group in range(self.file.num_row_groups):
            n_rows = self.file.metadata.row_group(group).num_rows
            if first_row + n_rows <= self.position:
                first_row += n_rows
                continue
            while (yield from self.read_row_group(group, first_row)) and self.position < first_row + n_rows:
                pass
            first_row += n_rows

    def read_row_group(self, group: int, first_row: int) -> Generator[bytes, None, bool]:
        """Yield the texts of a row group from row `position` on; return whether it ended early, after a long one.

        Arrow holds several times the size of a long text until the row group is closed.
        """
        import pyarrow as pa

        n_batch = count_batch_rows(self.file.metadata.row_group(group))
        tables = self.file.iter_batches(n_batch, row_groups=[group], columns=[self.options.text_field])
        for table in tables:
            column = select_text_column(self.where, table, self.options)
            values = column[max(0, self.position - first_row) :].to_pylist()[::-1]
            first_row += table.num_rows
            del table, column
            if has_long_text := any(value and len(value) > LONG_TEXT_BYTES for value in values):
                tables.close()
                pa.default_memory_pool().release_unused()
            while values:
                data = values.pop() or b""
                self.position += 1
                self.bytes_read += len(data)
                yield check_text(f"{self.where} row {self.position - 1}", data, self.options)
            if has_long_text:
                return True
        return False


def count_batch_rows(row_group: Any) -> int:
    """Return how many rows of a row group to hold in memory at a time: fewer if they are long on average."""
    # The size of all columns, because `row_group.column(i)` ends the process if the metadata of a column is damaged.
    return max(1, min(ROWS_PER_BATCH, TABLE_BYTES * row_group.num_rows // max(1, row_group.total_byte_size)))


def select_text_column(where: str, table: Any, options: ReadOptions) -> Any:
    """Return the column `options.text_field` of an Arrow table or record batch as binary values.

    Binary, because Arrow does not check that text is UTF-8. Raises `UserError` if there is no such column or it is
    not text.
    """
    import pyarrow as pa

    if options.text_field not in table.schema.names:
        raise UserError(missing_field_message(where, options, table.schema.names))
    column = table.column(options.text_field)
    is_dictionary = pa.types.is_dictionary(column.type)  # a categorical column of pandas or Polars
    value_type = column.type.value_type if is_dictionary else column.type
    if value_type not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise UserError(f"{where}: column {options.text_field!r} holds {list_names([column.type])}, not text")
    return (column.cast(value_type) if is_dictionary else column).cast(pa.large_binary())
