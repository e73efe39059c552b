"""`shortlist.json` beside a model: the ids that writing may be limited to, so that the head has few rows to read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import BUNDLED_MODEL, TEMP_SUFFIX, ModelFiles, read_json, write_json
from tinystories.data.dataset import open_split, read_meta
from tinystories.errors import UserError

FORMAT_VERSION = 1
FILE_NAME = "shortlist.json"
CHUNK_TOKENS = 1 << 24  # tokens counted at once

Array = npt.NDArray[Any]


def most_frequent_ids(files: ModelFiles, data: Path, n: int) -> tuple[Array, float]:
    """The end's id and the n - 1 others that are most frequent in prepared training stories (of equals the lower ones),
    ascending; and the share of the stories' tokens that they are.

    `UserError` where the data are of another tokenizer, or n is not from 2 to the number of ids that occur in them.
    """
    tokens, _ = open_matching_split(files, data, "train")
    counts = np.zeros(files.config.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=len(counts))
    max_ids = min(int(np.count_nonzero(counts)), len(counts) - 1)
    if not 2 <= n <= max_ids:
        raise UserError(f"a shortlist of {n:,} ids cannot be made of {data}; choose from 2 to {max_ids:,}")
    priorities = counts.copy()
    priorities[files.tokenizer().end_id] = len(tokens) + 1
    ids = np.sort(np.argsort(-priorities, kind="stable")[:n])
    return ids, float(counts[ids].sum() / len(tokens))


def coverage_loss(files: ModelFiles, data: Path, ids: Array) -> tuple[float, float]:
    """Shares of the validation tokens that are not among the ids, and of the validation stories that hold one."""
    tokens, index = open_matching_split(files, data, "val")
    is_excluded = np.ones(files.config.vocab_size, dtype=bool)
    is_excluded[ids] = False
    excluded_tokens = is_excluded[tokens]
    return float(excluded_tokens.mean()), float(
        np.logical_or.reduceat(excluded_tokens, index[:-1, 0].astype(np.intp)).mean()
    )


def open_matching_split(files: ModelFiles, data: Path, split: str) -> tuple[np.memmap, npt.NDArray[np.uint64]]:
    """As `open_split`, of data whose ids are the model's."""
    if read_meta(data).tokenizer_sha256 != files.tokenizer().sha256:
        cure = f"prepare it with --tokenizer {files.folder / 'tokenizer.json'}"
        raise UserError(f"{data} was prepared with another tokenizer than the model's; {cure}")
    tokens, index = open_split(data, split)
    if tokens.max() >= files.config.vocab_size:
        raise UserError(f"{data / split}.bin is damaged: it holds id {tokens.max()}; prepare the data again")
    return tokens, index


def write_shortlist(files: ModelFiles, ids: Array) -> Path:
    """Beside the model; whole or not at all. `UserError` where that is refused."""
    path = files.folder / FILE_NAME
    temp_path = path.with_suffix(TEMP_SUFFIX)
    content = {
        "format": FORMAT_VERSION,
        "tokenizer_sha256": files.tokenizer().sha256,
        "vocab_size": files.config.vocab_size,
        "ids": ids.tolist(),
    }
    try:
        write_json(temp_path, content | {"sha256": compute_digest(content)})
        os.replace(temp_path, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None
    return path


def read_shortlist(files: ModelFiles) -> Array:
    """The model's list, ascending. `UserError` where there is none, or it is damaged or of another vocabulary."""
    path, n = files.folder / FILE_NAME, min(8000, files.config.vocab_size // 4)
    cure = f"tinystories pack {files.folder} --shortlist {n} --data DIR"
    if files.folder.resolve() == BUNDLED_MODEL.resolve():
        raise UserError(f"the bundled storyteller has no shortlist; its {files.config.vocab_size:,} ids are few")
    if not path.exists():
        raise UserError(f"{files.folder} has no shortlist; make one with: {cure}")
    content, end_id, vocab_size = read_json(path), files.tokenizer().end_id, files.config.vocab_size
    if content.pop("sha256", None) != compute_digest(content) or content.get("format") != FORMAT_VERSION:
        raise UserError(f"{path} is damaged; make it again with: {cure}")
    if (content.get("tokenizer_sha256"), content.get("vocab_size")) != (files.tokenizer().sha256, vocab_size):
        raise UserError(f"{path} is of another vocabulary than the model's; make it again with: {cure}")
    ids: Any = content.get("ids")
    is_valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not is_valid or ids != sorted(set(ids)) or end_id not in ids:
        raise UserError(f"{path} does not hold ids of the model in order, the end's among them; make it with: {cure}")
    return np.array(ids)


def compute_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
