"""Prepared data on disk: `train.bin`, `val.bin`, `*.idx`, `tokenizer.json`, `meta.json` (see `open_split`)."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import numpy.typing as npt

from tinystories.config import require
from tinystories.config_file import build_dataclass, validate
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError, quoted
from tinystories.files import read_json_object

FORMAT_VERSION = 1
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitMeta:
    """Size of one split. `tokens` counts every id in the .bin, with the END before each story and the final END."""

    stories: int
    tokens: int
    bytes: int  # UTF-8 bytes of the story text, excluding END
    sha256: str  # of the .bin

    def __post_init__(self) -> None:
        for name in ("stories", "tokens", "bytes"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatasetMeta:
    """Contents of `meta.json`: what a prepared folder contains and how it was made."""

    format: int
    source: str
    val_source: str  # empty: the source's own validation split, or held out of the source
    revision: str  # commit hash of a Hub source, otherwise empty
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
    duplicates: int  # stories dropped as duplicates of an earlier one
    also_in_val: int  # training stories dropped because they are in the validation set
    empty: int  # empty stories dropped
    fingerprint: str  # SHA-256 of the request and the fingerprints of its input files
    lost_text: float = 0.0  # share of the validation text that the tokenizer cannot give back; in the file if not 0


def read_meta(folder: Path | str) -> DatasetMeta:
    """Return the meta.json of a prepared folder. Raises `UserError` if it is missing, invalid or of another format."""
    path = Path(folder) / "meta.json"
    if Path(folder).is_file():
        command = f"tinystories prepare {shlex.quote(str(folder))} --tokenizer bpe:4096 --out DIR"
        raise UserError(f"{folder} is a file; tokenize it first with: {command}")
    remedy = "create it with: tinystories prepare SOURCE --out DIR"
    try:
        values: dict[str, Any] = {"lost_text": 0.0} | read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no prepared data (no meta.json); {remedy}") from None
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if (version := values.get("format")) != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {quoted(version)}, but this version reads format {FORMAT_VERSION}; {remedy}"
        )
    try:
        splits = {
            name: build_dataclass(SplitMeta, values["splits"][name], str(path), f"splits.{name}.") for name in SPLITS
        }
        type_hints = {name: hint for name, hint in get_type_hints(DatasetMeta).items() if name != "splits"}
        return DatasetMeta(
            **{**values, **{n: validate(values[n], type_hints[n], str(path), n) for n in type_hints}, "splits": splits}
        )
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is invalid ({sanitize(error)}); {remedy}") from None


def open_split(folder: Path | str, split: str) -> tuple[np.memmap, npt.NDArray[np.uint64]]:
    """Memory-map the tokens and the story index of one split ("train" or "val"), read-only.

    The tokens of N stories are laid out as `END s1 END s2 ... END sN END`. The index has shape (N + 1, 2): row i holds
    the position of the END before story i and the total UTF-8 bytes of all stories before it; the last row holds the
    position of the final END and the bytes of all stories. Raises `UserError` if the files do not match meta.json.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    split_meta = meta.splits[split]
    tokens = open_memmap(folder / f"{split}.bin", np.dtype(meta.dtype).newbyteorder("<"), split_meta.tokens)
    index = open_memmap(folder / f"{split}.idx", np.dtype("<u8"), 2 * (split_meta.stories + 1)).reshape(-1, 2)
    if tuple(index[-1]) != (split_meta.tokens - 1, split_meta.bytes):
        raise UserError(f"{folder / split}.idx does not match meta.json; remove {folder} and prepare it again")
    # Compiled code and slices rely on it: stories follow each other, and each has at least its END.
    positions, byte_counts = index[:, 0], index[:, 1]
    if positions[0] or (positions[1:] <= positions[:-1]).any() or (byte_counts[1:] < byte_counts[:-1]).any():
        raise UserError(f"{folder / split}.idx is damaged; remove {folder} and prepare it again")
    return tokens, index


def open_memmap(path: Path, dtype: np.dtype[Any], n_items: int) -> np.memmap:
    """Memory-map a file of `n_items` items, read-only. Raises `UserError` if it is missing or has another size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; prepare the data again") from None
    if size != n_items * dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes but meta.json says {n_items * dtype.itemsize};"
            f" remove {path.parent} and prepare it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(n_items,))
