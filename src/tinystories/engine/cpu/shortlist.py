"""`shortlist.json` in a model directory: token ids that generation is limited to, so the LM head has fewer rows."""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import BUNDLED_MODEL, ModelFiles, read_json
from tinystories.data.dataset import open_split, read_meta
from tinystories.errors import UserError
from tinystories.files import write_json

FORMAT_VERSION = 1  # of shortlist.json
FILE_NAME = "shortlist.json"
CHUNK_TOKENS = 1 << 24  # tokens counted at a time, to limit memory

Array = npt.NDArray[Any]


def most_frequent_ids(files: ModelFiles, data: Path, n: int) -> tuple[Array, float]:
    """Return the end token and the n - 1 most frequent other ids in the training split, and their share of its tokens.

    Ids are ascending; ties go to the lower id. Raises UserError if the data was prepared with a different tokenizer, or
    n is not between 2 and the number of ids that occur in it.
    """
    tokens, _ = open_matching_split(files, data, "train")
    counts = np.zeros(files.config.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=len(counts))
    max_ids = min(int(np.count_nonzero(counts)), len(counts) - 1)
    if not 2 <= n <= max_ids:
        raise UserError(f"cannot make a shortlist of {n:,} ids from {data}; choose --shortlist from 2 to {max_ids:,}")
    priorities = counts.copy()
    priorities[files.tokenizer().end_id] = len(tokens) + 1
    ids = np.sort(np.argsort(-priorities, kind="stable")[:n])
    return ids, float(counts[ids].sum() / len(tokens))


def coverage_loss(files: ModelFiles, data: Path, ids: Array) -> tuple[float, float]:
    """Return the share of validation tokens that are not in `ids`, and of validation stories that have such a token.

    Raises UserError if the data was prepared with a different tokenizer.
    """
    tokens, index = open_matching_split(files, data, "val")
    is_excluded = np.ones(files.config.vocab_size, dtype=bool)
    is_excluded[ids] = False
    excluded_tokens = is_excluded[tokens]
    return float(excluded_tokens.mean()), float(
        np.logical_or.reduceat(excluded_tokens, index[:-1, 0].astype(np.intp)).mean()
    )


def open_matching_split(files: ModelFiles, data: Path, split: str) -> tuple[np.memmap, npt.NDArray[np.uint64]]:
    """Return `open_split` of data that was prepared with the model's tokenizer; raise UserError if it was not."""
    if read_meta(data).tokenizer_sha256 != files.tokenizer().sha256:
        hint = f"prepare it with --tokenizer {files.folder / 'tokenizer.json'}"
        raise UserError(f"{data} was prepared with a different tokenizer from the model's; {hint}")
    tokens, index = open_split(data, split)
    if tokens.max() >= files.config.vocab_size:
        raise UserError(f"{data / split}.bin is damaged: it contains id {tokens.max()}; prepare the data again")
    return tokens, index


def write_shortlist(files: ModelFiles, ids: Array) -> Path:
    """Write shortlist.json to the model directory atomically and return its path; raise UserError if that fails."""
    path = files.folder / FILE_NAME
    content = {
        "format": FORMAT_VERSION,
        "tokenizer_sha256": files.tokenizer().sha256,
        "vocab_size": files.config.vocab_size,
        "ids": ids.tolist(),
    }
    try:
        write_json(path, content | {"sha256": compute_digest(content)})
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None
    return path


def read_shortlist(files: ModelFiles) -> Array:
    """Return the model's shortlist, ascending.

    Raises UserError if there is none, or it is damaged or was made for a different vocabulary.
    """
    path, n = files.folder / FILE_NAME, min(8000, files.config.vocab_size // 4)
    command = f"tinystories quantize {shlex.quote(str(files.folder))} --shortlist {n} --data DIR"
    if files.folder.resolve() == BUNDLED_MODEL.resolve():
        n_ids = f"{files.config.vocab_size:,}"
        raise UserError(f"the bundled storyteller has no shortlist: its vocabulary has only {n_ids} ids")
    if not path.exists():
        raise UserError(f"{files.folder} has no shortlist; make one with: {command}")
    content, end_id, vocab_size = read_json(path), files.tokenizer().end_id, files.config.vocab_size
    if content.pop("sha256", None) != compute_digest(content) or content.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} is damaged; recreate it with: {command}")
    if (content.get("tokenizer_sha256"), content.get("vocab_size")) != (files.tokenizer().sha256, vocab_size):
        raise UserError(f"{path} was made for a different vocabulary; recreate it with: {command}")
    ids: Any = content.get("ids")
    is_valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not is_valid or ids != sorted(set(ids)) or end_id not in ids:
        problem = "ids must be ascending token ids of the model and include the end token"
        raise UserError(f"{path}: {problem}; recreate it with: {command}")
    return np.array(ids)


def compute_digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the contents of shortlist.json without its `sha256`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
