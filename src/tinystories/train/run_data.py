"""Which prepared data and models a run continues with: those it was trained on, and never any others."""

import os
import shlex
from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.config import Config
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


def check_recorded_models(config_file: Path, config: Config) -> None:
    """Raise `UserError` if the file is of a run, and the config names other models than the run by its relative paths.

    These are the teachers and train.init: the current folder may hold other models of the same names.
    """
    clock = read_newest_clock(config_file.parent)
    if not clock:
        return
    recorded = load_config(config_file).train
    names = {"train.teacher": recorded.teacher, "train.init": (recorded.init,)}
    for setting, used, dirs, hashes in (
        ("train.teacher", config.train.teacher, clock.get("teacher_dirs"), clock.get("teacher_sha256")),
        ("train.init", (config.train.init,), [clock.get("init_dir")], [clock.get("init_sha256")]),
    ):
        if not isinstance(dirs, list) or not isinstance(hashes, list):
            continue
        for name, folder, sha256 in zip(names[setting], dirs, hashes, strict=False):
            if name and sha256 and name in used and model_sha256(name) != sha256:
                raise UserError(
                    f"{setting}: {config_file} is of a training with {folder}, and {os.path.abspath(name)} is not that"
                    f" model; give --{setting} DIR"
                )


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


def model_sha256(folder: Path | str) -> str | None:
    """Return the SHA-256 of a model's weights, as its config.json says; None if the folder is something else."""
    try:
        return checkpoint.read_model(folder, verify_weights=False).weights_sha256
    except UserError:
        return None
