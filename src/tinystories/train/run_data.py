"""Which prepared data a run continues with: the data it was trained on, and never any other."""

import os
import shlex
from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.config_file import load_config
from tinystories.data.dataset import read_meta
from tinystories.errors import UserError
from tinystories.files import read_json_object


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a training run, possibly without a checkpoint yet."""
    return (folder / "config.toml").is_file()


def check_run_data(run_dir: Path, data_dir: str) -> None:
    """Raise `UserError` unless `data_dir`, which the settings of an existing run name, holds the data of that run.

    Data is recognized by the SHA-256 of train.bin in the newest checkpoint. A relative path may name other data, or
    none, if the current folder is not the one in which training began. The message names the data by its absolute path,
    which the checkpoint also holds.
    """
    clock = read_newest_clock(run_dir)
    data_sha256, absolute_dir = clock.get("data_sha256"), clock.get("data_dir")
    found_sha256 = prepared_sha256(Path(data_dir))
    if found_sha256 is not None and data_sha256 in (None, found_sha256):
        return
    stored_dir = absolute_dir or load_config(run_dir / "config.toml").data.dir
    # Earlier versions stored only the path as it was given, often from a folder above the run directory.
    folders = [Path(parent / stored_dir) for parent in (Path.cwd(), *Path(os.path.abspath(run_dir)).parents)]
    matching = (folder for folder in folders if data_sha256 is not None and prepared_sha256(folder) == data_sha256)
    advice = shlex.quote(os.path.abspath(folder)) if (folder := next(matching, None)) else "DIR"
    raise UserError(f"{run_dir} was trained on {stored_dir}, which is not here; give --data {advice}")


def read_newest_clock(run_dir: Path) -> dict[str, Any]:
    """Return the clock.json of a run's newest checkpoint, unverified; empty if there is none that can be read."""
    checkpoints = checkpoint.list_checkpoints(run_dir)
    try:
        return read_json_object(checkpoints[-1][1] / "state" / "clock.json") if checkpoints else {}
    except (FileNotFoundError, UserError):  # damaged: an older one may be resumed, which checks its data itself
        return {}


def prepared_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of train.bin of prepared data, as its meta.json says; None if the folder is something else."""
    try:
        return read_meta(folder).splits["train"].sha256
    except UserError:
        return None
