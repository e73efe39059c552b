"""Where an export or import goes: what may be written there, and what `--force` may replace."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinystories.checkpoint import INT8_WEIGHTS, WEIGHTS, read_json, require_name
from tinystories.data.tokenizer import sanitize
from tinystories.engine.cpu import shortlist
from tinystories.errors import UserError

# What this program writes into a model directory or an export for transformers. A run has more, such as checkpoints/.
OUR_FILES = {
    "config.json",
    "generation.json",
    "tokenizer.json",
    WEIGHTS,
    INT8_WEIGHTS,
    "packed-int4.safetensors",
    shortlist.FILE_NAME,
}
HF_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def check_destination(out: Path, *, is_folder: bool, force: bool, source: Path | None = None) -> None:
    """`UserError` unless a file, or with `folder` a directory, may be written as `out`.

    It must not be, hold, or be part of `source`, which is read meanwhile. Only with `force` is something replaced: a
    file by a file, a directory by a directory where this program wrote all that is in it.
    """
    require_name(out)
    if source is not None:
        out_path, source_path = Path(os.path.realpath(out)), Path(os.path.realpath(source))
        if (
            out_path == source_path
            or out_path in source_path.parents
            or (source_path in out_path.parents and os.path.lexists(out))
        ):
            raise UserError(f"{out} is, holds, or is part of {source}, which is read; choose another --out")
    if not os.path.lexists(out):
        return
    if reason := refusal_reason(out, is_folder):
        raise UserError(f"{out} {reason}; choose another --out")
    if not force:
        raise UserError(f"{out} exists; choose another --out, or replace it with --force")


def refusal_reason(out: Path, is_folder: bool) -> str | None:
    """Why what is at `out` is never replaced; None where it may be."""
    if out.is_dir() and not is_folder:
        return "is a directory, which no file replaces"
    if not out.is_dir() and not out.is_file():
        return "is neither a file nor a directory"
    if is_folder and not out.is_dir():
        return "is a file, which no directory replaces"
    if is_folder and out.is_symlink():
        return "is a link to a directory"
    if is_folder and not is_own_output(out):
        return "is a directory with files that are no export or import of this program"
    return None


def is_own_output(folder: Path) -> bool:
    """Whether a directory is empty, or holds a model of ours or for transformers and nothing else."""
    files = list(folder.iterdir())
    names = {file.name for file in files}
    if not all(file.is_file() for file in files):
        return False
    if not names:
        return True
    if "config.json" not in names:
        return False
    config = read_json(folder / "config.json")
    return ("format" in config and names <= OUR_FILES) or ("model_type" in config and names <= HF_FILES)


@contextlib.contextmanager
def translate_write_errors(out: Path) -> Iterator[None]:
    """What the disk or its owner refuses, as a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or sanitize(error)
        raise UserError(f"{out} could not be written: {reason}") from None
