"""Models split into several files: find all parts of one, and say what a single part is."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tinystories.errors import UserError

# As transformers and llama.cpp name parts: model-00001-of-00003.safetensors, stories-00001-of-00003.gguf.
PART_NAME = re.compile(r"(.{1,200})-(\d{5})-of-(\d{5})(\.\w{1,20})", re.ASCII)
MAX_PARTS = 1000
HF_WEIGHTS_NAME = re.compile(r"pytorch_model.*\.bin|.*\.safetensors", re.ASCII)
ORIGINAL_LLAMA_NAME = re.compile(r"consolidated(\.\d+)?\.(pth?|safetensors)", re.ASCII)


def list_parts(path: Path) -> list[Path]:
    """Return all files of the split model that `path` is a part of, in order; `[path]` if its name is not a part's.

    `UserError` if a part is missing.
    """
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count, suffix = match.groups()
    if not 0 < int(count) <= MAX_PARTS:
        raise UserError(f"{path} claims to be part of a model of {int(count):,} files; expected 1 to {MAX_PARTS:,}")
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(
            f"{path} is one of the {int(count)} files of a split model, and {len(missing)} of them are missing"
            f" ({missing[0].name}, ...); put all of them into one folder"
        )
    return parts


def find_parts(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return all parts of the split file STEM-00001-of-0000N.SUFFIX in a folder; none if there is no part."""
    names = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
    return next((list_parts(path) for path in names if PART_NAME.fullmatch(path.name)), [])


def is_one_model(paths: Sequence[Path]) -> bool:
    """Return whether files, at least one, are parts of one split model."""
    matches = [PART_NAME.fullmatch(path.name) for path in paths]
    return None not in matches and len({(match[1], match[3], match[4]) for match in matches if match}) == 1


def explain_weights_file(path: Path) -> str:
    """Return why a file or folder has only the weights of a model, or a part of them, and what to do; else ""."""
    files = path.iterdir() if path.is_dir() and not (path / "config.json").is_file() else [path]
    if any(ORIGINAL_LLAMA_NAME.fullmatch(file.name) for file in files):
        return (
            f"{path} has weights in the original layout of Llama or Mistral (consolidated.*), which is not read; import"
            " the Hugging Face version of the model, a folder with config.json"
        )
    is_part = PART_NAME.fullmatch(path.name) is not None
    has_config = (path.parent / "config.json").is_file()
    if path.is_file() and HF_WEIGHTS_NAME.fullmatch(path.name) and (has_config or is_part or path.suffix != ".bin"):
        what = "one part of the weights" if is_part else "the weights"
        action = f"tinystories import {shlex.quote(str(path.parent))} --out DIR" if has_config else "put them together"
        return f"{path} is {what} of a Hugging Face model; import its folder, with config.json and tokenizer: {action}"
    return ""
