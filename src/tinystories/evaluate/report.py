"""Bits per byte of a model on any data: story files, named sources or a folder of prepared data."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

from tinystories.data.dataset import open_split, read_meta
from tinystories.data.source.reader import DecodeErrors
from tinystories.data.source.resolve import iter_stories
from tinystories.data.text_loss import TextLoss
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport, encode_stories, evaluate_bits_per_byte, read_prepared_stories
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
    """Evaluate the model on `data`: story files, a named source or a prepared folder (its validation split).

    `limit` > 0 evaluates only that many stories: the first ones of files and sources, evenly spaced ones of a prepared
    folder (the same as evaluation during training). Raises `UserError` if a prepared folder was made with a different
    tokenizer than the model's.
    """
    loss = TextLoss()
    meta = read_meta(data) if (Path(data) / "meta.json").is_file() else None
    if meta is not None:
        if meta.tokenizer_sha256 != storyteller.tokenizer.sha256:
            raise UserError(
                f"{data} was prepared with a different tokenizer than the model's; evaluate on the text files instead"
            )
        stories = read_prepared_stories(*open_split(data, "val"), limit)
    else:
        texts = iter_stories(data, text_field=text_field, errors=errors, split="val")
        stories = encode_stories(itertools.islice(texts, limit or None), storyteller.tokenizer, loss)
    report = evaluate_bits_per_byte(storyteller.engine, stories, progress)
    return dataclasses.replace(report, lost_text=loss.share if meta is None else meta.lost_text)
