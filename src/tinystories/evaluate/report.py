"""Bits per byte of a model directory on any data: story files, named sources, or a prepared folder."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tinystories.data.prepared import open_split, read_meta
from tinystories.data.reader import Errors
from tinystories.data.sources import stories
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport, EncodedStory, bits_per_byte, encoded, prepared
from tinystories.generate.storyteller import Storyteller


def evaluate_model(
    teller: Storyteller,
    data: str,
    *,
    text_field: str = "text",
    errors: Errors = "strict",
    limit: int = 0,
    progress: Callable[[int], None] | None = None,
) -> BitsReport:
    """The whole of `data` (of a prepared folder the validation split), or `limit` stories of it.

    Those are the first ones of files, and of a prepared folder evenly spaced ones, as training chooses them.

    `UserError` where a prepared folder was made with another tokeniser than the model's.
    """
    return bits_per_byte(teller.engine, chosen_stories(teller, data, text_field, errors, limit), progress)


def chosen_stories(
    teller: Storyteller, data: str, text_field: str, errors: Errors, limit: int
) -> Iterator[EncodedStory]:
    if (Path(data) / "meta.json").is_file():
        if read_meta(data).tokenizer_sha256 != teller.tokenizer.sha256:
            raise UserError(
                f"{data} was prepared with another tokenizer than the model's; evaluate on the text files instead"
            )
        return prepared(*open_split(data, "val"), limit)
    texts = stories(data, text_field=text_field, errors=errors, split="val")
    return encoded(itertools.islice(texts, limit or None), teller.tokenizer)
