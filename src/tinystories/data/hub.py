"""Stories from the Hugging Face Hub, streamed by `datasets` at one commit."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

from tinystories.data.columns import ROWS, text_column
from tinystories.data.deadline import within
from tinystories.data.reader import Batch, ReadOptions, batches, decoded, read_txt
from tinystories.data.tokenizer import one_line
from tinystories.errors import UserError

CONTACT_SECONDS = 20.0  # for the Hub's first answer
STALL_SECONDS = 180.0  # without any data later on; `datasets` itself tries again for 100


def repository(name: str) -> tuple[str, str]:
    """OWNER/NAME and REVISION (empty: the latest) of hf:OWNER/NAME[@REVISION]. `UserError` for another form."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None or ".." in name:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return match[1], match[2] or ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """One split of a dataset on the Hub. Rows of its `text_field`, or .txt files with END between stories."""

    name: str  # as in errors and meta.json
    repo: str
    revision: str = ""  # as asked for; after `pinned` the commit
    split: str = "train"
    rows: tuple[int, int | None] = (0, None)  # first and one past the last of the split's rows
    data_files: dict[str, str] | None = None  # split -> file, where the repository does not say so itself
    val_rows: tuple[int, int | None] | None = None  # validation rows of the same split
    held_out = 0.005

    @property
    def bytes_total(self) -> int:
        """Not known before all is read."""
        return 0

    def fingerprint(self) -> list[Any]:
        """What was asked for; the commit it meant is recorded, but later ones do not make prepared data stale."""
        return [self.repo, self.revision, self.split, self.rows, self.data_files]

    def pinned(self, revision: str = "") -> "HubSource":
        """The same at a fixed commit: of `revision`, else of its own, else the latest.

        Raises `UserError` within CONTACT_SECONDS when the Hub does not answer or does not know the dataset.
        """
        huggingface_hub = self._client()
        api = huggingface_hub.HfApi()
        revision = revision or self.revision
        try:
            info = within(
                CONTACT_SECONDS,
                lambda: api.dataset_info(self.repo, revision=revision or None, timeout=CONTACT_SECONDS / 2),
            )
        except huggingface_hub.errors.RevisionNotFoundError:
            raise UserError(f"{self.name}: {self.repo} has no revision {revision}") from None
        except huggingface_hub.errors.RepositoryNotFoundError:
            raise UserError(f"{self.name}: no dataset {self.repo} on the Hub (a private one needs HF_TOKEN)") from None
        except Exception as error:  # whatever httpx, the Hub or a proxy makes of it
            raise UserError(
                f"{self.name}: {api.endpoint}/datasets/{self.repo} was tried and does not answer"
                f" ({type(error).__name__}); go on with prepared data (--data DIR), a local file, or `sample`"
            ) from None
        return dataclasses.replace(self, revision=info.sha)

    def validation(self) -> "HubSource | None":
        """Its own validation split, if it has one. Of a pinned source only."""
        if self.val_rows is not None:
            return dataclasses.replace(self, name=f"{self.name} (validation)", rows=self.val_rows, val_rows=None)
        with self._errors():
            splits = within(STALL_SECONDS, lambda: list(self._builder().config.data_files))
        if "validation" not in splits:
            return None
        return dataclasses.replace(self, name=f"{self.name} (validation)", split="validation")

    def batches(self, options: ReadOptions, position: Any = None) -> Iterator[Batch]:
        """`position` is [number of the .txt file, position in it] or [state of `datasets`, rows after it, row]."""
        from datasets.packaged_modules.text.text import Text

        with self._errors():
            builder = within(STALL_SECONDS, self._builder)
            if self.split not in builder.config.data_files:
                known = ", ".join(map(str, builder.config.data_files))
                raise UserError(f"{self.name}: no split {self.split!r}; splits: {known}")
            if isinstance(builder, Text):
                found = self._txt_batches(builder, options, position)
            else:
                rows = HubRows(self, builder.as_streaming_dataset(self.split).with_format("arrow"), options, position)
                found = batches(rows, rows)
            while (batch := within(STALL_SECONDS, lambda: next(found, None))) is not None:
                yield batch

    def _txt_batches(self, builder: Any, options: ReadOptions, position: Any) -> Iterator[Batch]:
        from datasets.utils.file_utils import xopen

        first, at = position or (0, None)
        files = builder.config.data_files[self.split]
        for number, url in enumerate(files[first:], first):
            with xopen(url, "rb") as file:
                for batch in read_txt(f"{self.name}: {url}", file, options, at if number == first else None):
                    yield dataclasses.replace(batch, position=[number, batch.position])

    def _builder(self) -> Any:
        import datasets

        return datasets.load_dataset_builder(self.repo, revision=self.revision, data_files=self.data_files)

    def _client(self) -> Any:
        """The package huggingface_hub; it and `datasets` are told to leave messages to us."""
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
    def _errors(self) -> Iterator[None]:
        """Whatever goes wrong in the clients, as a `UserError`."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except Exception as error:
            raise UserError(
                f"{self.name}: streaming {self.repo}@{self.revision} failed ({type(error).__name__}:"
                f" {one_line(error)[:200]}); run the same again to go on"
            ) from None


class HubRows:
    """The texts of a streamed dataset's column and how far they were read."""

    def __init__(self, source: HubSource, dataset: Any, options: ReadOptions, position: Any) -> None:
        self.source, self.dataset, self.options = source, dataset, options
        self.state: dict[str, Any] | None
        self.after: int
        self.row: int
        self.state, self.after, self.row = position or (None, 0, 0)
        self.read = 0

    @property
    def position(self) -> list[Any]:
        return [self.state, self.after, self.row]

    def __iter__(self) -> Iterator[str]:
        first, end = self.source.rows
        if self.state is not None:
            self.dataset.load_state_dict(self.state)
        for table in self.dataset.iter(ROWS):
            for value in text_column(self.source.name, table, self.options)[self.after :]:
                if end is not None and self.row >= end:
                    return
                data = value.as_py() or b""
                self.after, self.row, self.read = self.after + 1, self.row + 1, self.read + len(data)
                if self.row > first:
                    yield decoded(f"{self.source.name} row {self.row - 1}", data, self.options)
            self.state, self.after = self.dataset.state_dict(), 0
