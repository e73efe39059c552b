"""What a run needs to go on where it stopped: `state/` beside the weights of each checkpoint."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinystories import checkpoint
from tinystories.config import Config, SamplingConfig, load_config, to_toml
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.train.optim import Optimizers, optimizer_tensors, restore_optimizers

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Clock:
    """Where a run stands. `step` counts finished optimizer steps; all else is derived or for people."""

    step: int = 0
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of work, over all sittings
    best_step: int = -1
    best_bits_per_byte: float = float("inf")
    metrics_bytes: int = 0  # length of metrics.jsonl at this step
    samples_bytes: int = 0  # length of samples.md at this step
    recent_nats: float = 0.0  # summed loss, targets and seconds since the last line of metrics.jsonl
    recent_targets: int = 0
    recent_seconds: float = 0.0
    micro_batch: int = 0  # rows of a pass, which decide the order of sums
    data_sha256: str = ""  # of train.bin


def save(
    run: Path,
    clock: Clock,
    config: Config,
    model: GPT,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
) -> Path:
    """Write the checkpoint of this step, make the run directory that model, and drop what is no longer kept."""
    folder = checkpoint.folder_of(run, clock.step)
    try:
        with checkpoint.whole(folder, folder.with_name(folder.name + checkpoint.DRAFT)) as draft:
            checkpoint.write_model(draft, model, tokenizer, SamplingConfig(), provenance)
            state = draft / "state"
            state.mkdir()
            save_file(optimizer_tensors(model, optimizers), state / "optimizer.safetensors")
            (state / "config.toml").write_text(to_toml(config), encoding="utf-8")
            record = dataclasses.asdict(clock) | {
                "optimizer_sha256": checkpoint.sha256(state / "optimizer.safetensors")
            }
            checkpoint.write_json(state / "clock.json", record)
        checkpoint.publish(folder, run)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({error.strerror}); the checkpoints before it are whole:"
            " free some space, then add --resume"
        ) from None
    prune(run, clock.best_step, config.train.keep_checkpoints)
    return folder


def prune(run: Path, best_step: int, keep: int) -> None:
    """Remove checkpoints that are neither among the newest `keep` nor the best, and drafts that were left behind."""
    for step, folder in checkpoint.checkpoints(run)[:-keep]:
        if step != best_step:
            shutil.rmtree(folder)
    for draft in (run / "checkpoints").glob("*" + checkpoint.DRAFT):
        shutil.rmtree(draft)


def latest(run: Path) -> Path | None:
    """The newest checkpoint that is whole and undamaged; says so when it has to pass over one.

    None where there is no checkpoint at all; `UserError` where there are some and all are damaged.
    """
    found = checkpoint.checkpoints(run)
    for _, folder in reversed(found):
        try:
            checkpoint.read_model(folder)
            read_clock(folder)
        except UserError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        return folder
    if found:
        raise UserError(f"{run}/checkpoints: every checkpoint is damaged; remove {run} to train anew")
    return None


def read_clock(folder: Path) -> Clock:
    """The clock of a checkpoint, after checking its optimizer state against the checksum."""
    record = checkpoint.read_json(folder / "state" / "clock.json")
    path = folder / "state" / "optimizer.safetensors"
    if not path.is_file() or checkpoint.sha256(path) != record.pop("optimizer_sha256", None):
        raise UserError(f"{path} is missing or does not match its checksum")
    try:
        return Clock(**record)
    except TypeError as error:
        raise UserError(f"{folder}/state/clock.json cannot be read: {error}") from None


def read_config(folder: Path) -> Config:
    return load_config(folder / "state" / "config.toml")


def begin_with(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Give a new run the weights of a model directory, whose context and dropout may be others.

    `UserError` where its tokenizer or another setting of its shape is not the run's.
    """
    files = checkpoint.read_model(folder)
    if files.tokenizer().sha256 != tokenizer.sha256:
        raise UserError(f"{folder} has another tokenizer than the data; prepare them with --tokenizer {folder}")
    theirs, ours = dataclasses.asdict(files.config), dataclasses.asdict(model.config)
    for name in theirs.keys() - {"n_ctx", "dropout"}:
        if theirs[name] != ours[name]:
            raise UserError(f"model.{name} is {ours[name]}, but {folder} has {theirs[name]}; set it to that")
    if files.is_packed:
        raise UserError(f"{folder} has packed weights alone, which are rounded; train on from the model they come from")
    checkpoint.load_weights(files, model)


def restore(folder: Path, model: GPT, optimizers: Optimizers) -> Clock:
    """Bring model and optimizers to the state of a checkpoint; returns its clock."""
    checkpoint.load_weights(checkpoint.read_model(folder), model)
    path = folder / "state" / "optimizer.safetensors"
    try:
        restore_optimizers(model, optimizers, load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return read_clock(folder)
