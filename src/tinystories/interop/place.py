"""Where an export or import goes: what may be written there, and what `--force` may replace."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinystories.checkpoint import PACKED, WEIGHTS, read_json, require_name
from tinystories.data.tokenizer import one_line
from tinystories.engine.cpu import shortlist
from tinystories.errors import UserError

# What this program writes into a model directory or an export for transformers. A run has more, such as checkpoints/.
OURS = {"config.json", "generation.json", "tokenizer.json", WEIGHTS, PACKED, "packed-int4.safetensors", shortlist.NAME}
THEIRS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def require_place(out: Path, *, folder: bool, force: bool, source: Path | None = None) -> None:
    """`UserError` unless a file, or with `folder` a directory, may be written as `out`.

    It must not be, hold, or be part of `source`, which is read meanwhile. Only with `force` is something replaced: a
    file by a file, a directory by a directory where this program wrote all that is in it.
    """
    require_name(out)
    if source is not None:
        new, old = Path(os.path.realpath(out)), Path(os.path.realpath(source))
        if new == old or new in old.parents or (old in new.parents and os.path.lexists(out)):
            raise UserError(f"{out} is, holds, or is part of {source}, which is read; choose another --out")
    if not os.path.lexists(out):
        return
    if reason := why_kept(out, folder):
        raise UserError(f"{out} {reason}; choose another --out")
    if not force:
        raise UserError(f"{out} exists; choose another --out, or replace it with --force")


def why_kept(out: Path, folder: bool) -> str | None:
    """Why what is at `out` is never replaced; None where it may be."""
    if out.is_dir() and not folder:
        return "is a directory, which no file replaces"
    if not out.is_dir() and not out.is_file():
        return "is neither a file nor a directory"
    if folder and not out.is_dir():
        return "is a file, which no directory replaces"
    if folder and out.is_symlink():
        return "is a link to a directory"
    if folder and not is_written_here(out):
        return "is a directory with files that are no export or import of this program"
    return None


def is_written_here(folder: Path) -> bool:
    """Whether a directory is empty, or holds a model of ours or for transformers and nothing else."""
    files = list(folder.iterdir())
    names = {file.name for file in files}
    if not all(file.is_file() for file in files):
        return False
    if not names:
        return True
    if "config.json" not in names:
        return False
    described = read_json(folder / "config.json")
    return ("format" in described and names <= OURS) or ("model_type" in described and names <= THEIRS)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the disk or its owner refuses, as a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{out} could not be written: {reason}") from None
