"""Bits per byte of a model directory on any data: story files, named sources, or a prepared folder."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tinystories.data.dataset import open_split, read_meta
from tinystories.data.reader import DecodeErrors
from tinystories.data.sources import iter_stories
from tinystories.errors import UserError
from tinystories.evaluate.bits import (
    BitsReport,
    EncodedStory,
    encode_stories,
    evaluate_bits_per_byte,
    read_prepared_stories,
)
from tinystories.generate.storyteller import Storyteller


def evaluate_model(
    storyteller: Storyteller,
    data: str,
    *,
    text_field: str = "text",
    errors: DecodeErrors = "strict",
    limit: int = 0,
    progress: Callable[[int], None] | None = None,
) -> BitsReport:
    """The whole of `data` (of a prepared folder the validation split), or `limit` stories of it.

    Those are the first ones of files, and of a prepared folder evenly spaced ones, as training chooses them.

    `UserError` where a prepared folder was made with another tokeniser than the model's.
    """
    return evaluate_bits_per_byte(
        storyteller.engine, load_stories(storyteller, data, text_field, errors, limit), progress
    )


def load_stories(
    storyteller: Storyteller, data: str, text_field: str, errors: DecodeErrors, limit: int
) -> Iterator[EncodedStory]:
    if (Path(data) / "meta.json").is_file():
        if read_meta(data).tokenizer_sha256 != storyteller.tokenizer.sha256:
            raise UserError(
                f"{data} was prepared with another tokenizer than the model's; evaluate on the text files instead"
            )
        return read_prepared_stories(*open_split(data, "val"), limit)
    texts = iter_stories(data, text_field=text_field, errors=errors, split="val")
    return encode_stories(itertools.islice(texts, limit or None), storyteller.tokenizer)
