"""Stream stories from the Hugging Face Hub with `datasets`, pinned to one commit."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

from tinystories.data.source.arrow import ROWS_PER_BATCH, select_text_column
from tinystories.data.source.reader import ReadOptions, StoryBatch, batch_texts, check_text, read_txt
from tinystories.data.source.timeout import call_with_timeout
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError, list_names

CONNECT_TIMEOUT_SECONDS = 20.0  # for the Hub's first response
STALL_TIMEOUT_SECONDS = 180.0  # without any data after that; `datasets` itself retries for 100 s


def parse_hub_name(name: str) -> tuple[str, str]:
    """Return OWNER/NAME and REVISION (empty: the latest) of hf:OWNER/NAME[@REVISION]. `UserError` if malformed."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None or ".." in name:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return match[1], match[2] or ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """One split of a Hub dataset. Its stories are rows of the text column, or .txt files with END between stories."""

    name: str  # used in errors and meta.json
    repo: str
    revision: str = ""  # as requested; the commit hash after `pin_revision`
    split: str = "train"
    rows: tuple[int, int | None] = (0, None)  # half-open range of the split's rows
    data_files: dict[str, str] | None = None  # split -> file, if the repository does not define splits
    val_rows: tuple[int, int | None] | None = None  # rows of the same split used for validation
    val_fraction = 0.005

    @property
    def total_bytes(self) -> int:
        """Return 0: the size is unknown until everything has been read."""
        return 0

    def fingerprint(self) -> list[Any]:
        """Return JSON of the request, not of the resolved commit: newer commits do not make prepared data stale."""
        return [self.repo, self.revision, self.split, self.rows, self.data_files]

    def pin_revision(self, revision: str = "") -> "HubSource":
        """Return this source pinned to a commit: that of `revision`, else of its own revision, else the latest.

        Raises `UserError` if the dataset or revision does not exist, or if the Hub does not respond within
        CONNECT_TIMEOUT_SECONDS.
        """
        huggingface_hub = self._import_client()
        api = huggingface_hub.HfApi()
        revision = revision or self.revision
        try:
            info = call_with_timeout(
                CONNECT_TIMEOUT_SECONDS,
                lambda: api.dataset_info(self.repo, revision=revision or None, timeout=CONNECT_TIMEOUT_SECONDS / 2),
            )
        except huggingface_hub.errors.RevisionNotFoundError:
            raise UserError(f"{self.name}: {self.repo} has no revision {revision}") from None
        except huggingface_hub.errors.RepositoryNotFoundError:
            raise UserError(f"{self.name}: no dataset {self.repo} on the Hub (a private one needs HF_TOKEN)") from None
        except Exception as error:  # anything raised by httpx, the Hub or a proxy
            raise UserError(
                f"{self.name}: could not reach {api.endpoint}/datasets/{self.repo} ({type(error).__name__});"
                " use prepared data (--data DIR), a local file, or `sample`"
            ) from None
        return dataclasses.replace(self, revision=info.sha)

    def get_validation_split(self) -> "HubSource | None":
        """Return the dataset's own validation split, or None. The source must be pinned."""
        if self.val_rows is not None:
            return dataclasses.replace(self, name=f"{self.name} (validation)", rows=self.val_rows, val_rows=None)
        with self._wrap_errors():
            splits = call_with_timeout(STALL_TIMEOUT_SECONDS, lambda: list(self._load_builder().config.data_files))
        if "validation" not in splits:
            return None
        return dataclasses.replace(self, name=f"{self.name} (validation)", split="validation")

    def read_batches(self, options: ReadOptions, position: Any = None) -> Iterator[StoryBatch]:
        """Yield batches from `position` on; None is the start.

        `position` is [index of the file, position in it] for .txt files, otherwise [state of the `datasets` stream,
        rows read since that state, number of the next row].
        """
        from datasets.packaged_modules.text.text import Text

        with self._wrap_errors():
            builder = call_with_timeout(STALL_TIMEOUT_SECONDS, self._load_builder)
            if self.split not in builder.config.data_files:
                known_splits = list_names(builder.config.data_files)
                raise UserError(f"{self.name}: no split {self.split!r}; splits: {known_splits}")
            if isinstance(builder, Text):
                batch_iterator = self._read_txt_batches(builder, options, position)
            else:
                rows = HubRows(self, builder.as_streaming_dataset(self.split).with_format("arrow"), options, position)
                batch_iterator = batch_texts(rows, rows)
            while (batch := call_with_timeout(STALL_TIMEOUT_SECONDS, lambda: next(batch_iterator, None))) is not None:
                yield batch

    def _read_txt_batches(self, builder: Any, options: ReadOptions, position: Any) -> Iterator[StoryBatch]:
        from datasets.utils.file_utils import xopen

        start_index, file_position = position or (0, None)
        files = builder.config.data_files[self.split]
        for file_index, url in enumerate(files[start_index:], start_index):
            with xopen(url, "rb") as file:
                for batch in read_txt(
                    f"{self.name}: {url}", file, options, file_position if file_index == start_index else None
                ):
                    yield dataclasses.replace(batch, position=[file_index, batch.position])

    def _load_builder(self) -> Any:
        import datasets

        return datasets.load_dataset_builder(self.repo, revision=self.revision, data_files=self.data_files)

    def _import_client(self) -> Any:
        """Import and return huggingface_hub; silence its log messages and progress bars and those of `datasets`."""
        try:
            import datasets
            import huggingface_hub
        except ImportError:
            raise UserError(f"{self.name} needs datasets: pip install 'tinystories-gpt[train]'") from None
        for package in (datasets, huggingface_hub):
            package.logging.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        return huggingface_hub

    @contextlib.contextmanager
    def _wrap_errors(self) -> Iterator[None]:
        """Turn any error of the Hub clients into a `UserError`."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except Exception as error:
            raise UserError(
                f"{self.name}: streaming {self.repo}@{self.revision} failed ({type(error).__name__}:"
                f" {sanitize(error)[:200]}); run the same command again to resume"
            ) from None


class HubRows:
    """Iterates over the text column of a streamed dataset; a `Cursor` that can be resumed.

    `datasets` can save its state only between tables, so a position is the state before the current table plus the
    number of its rows already read.
    """

    def __init__(self, source: HubSource, dataset: Any, options: ReadOptions, position: Any) -> None:
        self.source, self.dataset, self.options = source, dataset, options
        self.dataset_state: dict[str, Any] | None
        self.rows_after_state: int
        self.row_index: int
        self.dataset_state, self.rows_after_state, self.row_index = position or (None, 0, 0)
        self.bytes_read = 0

    @property
    def position(self) -> list[Any]:
        return [self.dataset_state, self.rows_after_state, self.row_index]

    def __iter__(self) -> Iterator[bytes]:
        first_row, end_row = self.source.rows
        if self.dataset_state is not None:
            self.dataset.load_state_dict(self.dataset_state)
        for table in self.dataset.iter(ROWS_PER_BATCH):
            for value in select_text_column(self.source.name, table, self.options)[self.rows_after_state :]:
                if end_row is not None and self.row_index >= end_row:
                    return
                data = value.as_py() or b""
                self.rows_after_state, self.row_index, self.bytes_read = (
                    self.rows_after_state + 1,
                    self.row_index + 1,
                    self.bytes_read + len(data),
                )
                if self.row_index > first_row:
                    yield check_text(f"{self.source.name} row {self.row_index - 1}", data, self.options)
            self.dataset_state, self.rows_after_state = self.dataset.state_dict(), 0
