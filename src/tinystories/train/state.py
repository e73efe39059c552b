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
from tinystories.train.optim import Optimizers, flatten_optimizer_state, load_optimizer_state

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainState:
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


def save_checkpoint(
    run_dir: Path,
    train_state: TrainState,
    config: Config,
    model: GPT,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    provenance: dict[str, Any],
) -> Path:
    """Write the checkpoint of this step, make the run directory that model, and drop what is no longer kept."""
    checkpoint_dir = checkpoint.checkpoint_folder(run_dir, train_state.step)
    try:
        with checkpoint.atomic_directory(
            checkpoint_dir, checkpoint_dir.with_name(checkpoint_dir.name + checkpoint.TEMP_SUFFIX)
        ) as staging_dir:
            checkpoint.write_model(staging_dir, model, tokenizer, SamplingConfig(), provenance)
            state_dir = staging_dir / "state"
            state_dir.mkdir()
            save_file(flatten_optimizer_state(model, optimizers), state_dir / "optimizer.safetensors")
            (state_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
            record = dataclasses.asdict(train_state) | {
                "optimizer_sha256": checkpoint.sha256(state_dir / "optimizer.safetensors")
            }
            checkpoint.write_json(state_dir / "clock.json", record)
        checkpoint.publish(checkpoint_dir, run_dir)
    except OSError as error:
        raise UserError(
            f"{checkpoint_dir} could not be written ({error.strerror}); the checkpoints before it are whole:"
            " free some space, then add --resume"
        ) from None
    prune_checkpoints(run_dir, train_state.best_step, config.train.keep_checkpoints)
    return checkpoint_dir


def prune_checkpoints(run_dir: Path, best_step: int, keep: int) -> None:
    """Remove checkpoints that are neither among the newest `keep` nor the best, and drafts that were left behind."""
    for step, folder in checkpoint.list_checkpoints(run_dir)[:-keep]:
        if step != best_step:
            shutil.rmtree(folder)
    for staging_dir in (run_dir / "checkpoints").glob("*" + checkpoint.TEMP_SUFFIX):
        shutil.rmtree(staging_dir)


def find_latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole and undamaged; says so when it has to pass over one.

    None where there is no checkpoint at all; `UserError` where there are some and all are damaged.
    """
    checkpoints = checkpoint.list_checkpoints(run_dir)
    for _, folder in reversed(checkpoints):
        try:
            checkpoint.read_model(folder)
            read_train_state(folder)
        except UserError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        return folder
    if checkpoints:
        raise UserError(f"{run_dir}/checkpoints: every checkpoint is damaged; remove {run_dir} to train anew")
    return None


def read_train_state(folder: Path) -> TrainState:
    """The clock of a checkpoint, after checking its optimizer state against the checksum."""
    record = checkpoint.read_json(folder / "state" / "clock.json")
    path = folder / "state" / "optimizer.safetensors"
    if not path.is_file() or checkpoint.sha256(path) != record.pop("optimizer_sha256", None):
        raise UserError(f"{path} is missing or does not match its checksum")
    try:
        return TrainState(**record)
    except TypeError as error:
        raise UserError(f"{folder}/state/clock.json cannot be read: {error}") from None


def read_config(folder: Path) -> Config:
    return load_config(folder / "state" / "config.toml")


def initialize_from(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Give a new run the weights of a model directory, whose context and dropout may be others.

    `UserError` where its tokenizer or another setting of its shape is not the run's.
    """
    source = checkpoint.read_model(folder)
    if source.tokenizer().sha256 != tokenizer.sha256:
        raise UserError(f"{folder} has another tokenizer than the data; prepare them with --tokenizer {folder}")
    source_settings, model_settings = dataclasses.asdict(source.config), dataclasses.asdict(model.config)
    for name in source_settings.keys() - {"n_ctx", "dropout"}:
        if source_settings[name] != model_settings[name]:
            raise UserError(
                f"model.{name} is {model_settings[name]}, but {folder} has {source_settings[name]}; set it to that"
            )
    if source.is_int8_only:
        raise UserError(f"{folder} has packed weights alone, which are rounded; train on from the model they come from")
    checkpoint.load_weights(source, model)


def restore_checkpoint(folder: Path, model: GPT, optimizers: Optimizers) -> TrainState:
    """Bring model and optimizers to the state of a checkpoint; returns its clock."""
    checkpoint.load_weights(checkpoint.read_model(folder), model)
    path = folder / "state" / "optimizer.safetensors"
    try:
        load_optimizer_state(model, optimizers, load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return read_train_state(folder)
