"""Prepared data on disk: `train.bin`, `val.bin`, `*.idx`, `tokenizer.json`, `meta.json` (see `open_split`)."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import numpy.typing as npt

from tinystories.config import build_dataclass, require, validate
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitMeta:
    """`tokens` counts every id in the .bin, the END before each story and after the last one included."""

    stories: int
    tokens: int
    bytes: int  # UTF-8 bytes of the stories' text, without the ENDs
    sha256: str  # of the .bin

    def __post_init__(self) -> None:
        for name in ("stories", "tokens", "bytes"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatasetMeta:
    """What a prepared folder holds and what it was made of: the contents of its `meta.json`."""

    format: int
    source: str
    val_source: str  # empty: held out of the source
    revision: str  # commit of a Hub source, else empty
    val_revision: str
    text_field: str
    errors: str
    keep_duplicates: bool
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    end_id: int
    dtype: Literal["uint16", "uint32"]  # little-endian
    splits: dict[str, SplitMeta]  # "train" and "val"
    duplicates: int  # stories dropped because an equal one came before
    also_in_val: int  # train stories dropped because the validation set has them
    empty: int  # stories dropped because nothing was in them
    fingerprint: str  # of the request and its input files


def read_meta(folder: Path | str) -> DatasetMeta:
    """The meta.json of a prepared folder; `UserError` when it is no (whole) prepared data."""
    path = Path(folder) / "meta.json"
    remedy = "make it by: tinystories prepare SOURCE --out DIR"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
    except NotADirectoryError:
        command = f"tinystories prepare {folder} --tokenizer bpe:4096 --out DIR"
        raise UserError(f"{folder} is a file; make a folder of tokens of it by: {command}") from None
    except FileNotFoundError:
        raise UserError(f"{folder} holds no prepared data (no meta.json); {remedy}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this version reads {FORMAT_VERSION}; {remedy}")
    try:
        splits = {
            name: build_dataclass(SplitMeta, values["splits"][name], str(path), f"splits.{name}.") for name in SPLITS
        }
        type_hints = {name: hint for name, hint in get_type_hints(DatasetMeta).items() if name != "splits"}
        return DatasetMeta(
            **{**values, **{n: validate(values[n], type_hints[n], str(path), n) for n in type_hints}, "splits": splits}
        )
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is not as prepare writes it ({sanitize(error)}); {remedy}") from None


def open_split(folder: Path | str, split: str) -> tuple[np.memmap, npt.NDArray[np.uint64]]:
    """Tokens and stories of one split, as `END s1 END s2 ... END sN END`.

    Returns the ids (memory-mapped, read only) and an index of shape (N + 1, 2): row i holds the position of the END
    before story i and the UTF-8 bytes of all stories before it; the last row the final END and all bytes.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    split_meta = meta.splits[split]
    tokens = open_memmap(folder / f"{split}.bin", np.dtype(meta.dtype).newbyteorder("<"), split_meta.tokens)
    index = open_memmap(folder / f"{split}.idx", np.dtype("<u8"), 2 * (split_meta.stories + 1)).reshape(-1, 2)
    if tuple(index[-1]) != (split_meta.tokens - 1, split_meta.bytes):
        raise UserError(f"{folder / split}.idx does not belong to its meta.json; remove {folder} and prepare it again")
    return tokens, index


def open_memmap(path: Path, dtype: np.dtype[Any], n_items: int) -> np.memmap:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; prepare the data again") from None
    if size != n_items * dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes where meta.json says {n_items * dtype.itemsize};"
            f" remove {path.parent} and prepare it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(n_items,))
