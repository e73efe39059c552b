"""Checks of --out for exports and imports: what may be written there, and what --force may replace."""

import os
from pathlib import Path

from tinystories.checkpoint import INT8_WEIGHTS, WEIGHTS, read_json
from tinystories.engine.cpu import shortlist
from tinystories.errors import UserError
from tinystories.files import require_name

# The files that this program writes into a model directory, or into an export for transformers. A training run has
# more, such as checkpoints/, and is therefore never replaced.
OUR_FILES = {"config.json", "generation.json", "tokenizer.json", WEIGHTS, INT8_WEIGHTS, shortlist.FILE_NAME}
OUR_FILES |= {"packed-int4.safetensors"}
HF_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def check_destination(out: Path, *, is_folder: bool, force: bool, source: Path | None = None) -> None:
    """Raise `UserError` unless a file (with `is_folder`: a directory) may be written as `out`.

    `out` must not be, contain, or be inside `source`, the model being read. What exists is replaced only with `force`:
    a file by a file, and a directory by a directory if it holds nothing but files that this program wrote.
    """
    require_name(out)
    if source is not None:
        out_path, source_path = Path(os.path.realpath(out)), Path(os.path.realpath(source))
        is_inside = source_path in out_path.parents and os.path.lexists(out)
        if is_inside or source_path.is_relative_to(out_path):
            raise UserError(f"{out} is, contains, or is inside {source}, the model being read; choose another --out")
    if not os.path.lexists(out):
        return
    if reason := refusal_reason(out, is_folder):
        raise UserError(f"{out} {reason}; choose another --out")
    if not force:
        raise UserError(f"{out} exists; choose another --out, or replace it with --force")


def refusal_reason(out: Path, is_folder: bool) -> str | None:
    """Return why the existing `out` must never be replaced; None if --force may replace it."""
    if out.is_dir() and not is_folder:
        return "is a directory and cannot be replaced by a file"
    if not out.is_dir() and not out.is_file():
        return "is neither a file nor a directory"
    if is_folder and not out.is_dir():
        return "is a file and cannot be replaced by a directory"
    if is_folder and out.is_symlink():
        return "is a symlink to a directory"
    if is_folder and not is_own_output(out):
        return "is a directory with files that are not an export or import of this program"
    return None


def is_own_output(folder: Path) -> bool:
    """Return whether a directory is empty, or contains one of our models or transformers exports and nothing else."""
    files = list(folder.iterdir())
    names = {file.name for file in files if file.is_file()}
    if len(names) < len(files) or (names and "config.json" not in names):
        return False
    config = read_json(folder / "config.json") if names else {}
    return not names or ("format" in config and names <= OUR_FILES) or ("model_type" in config and names <= HF_FILES)
