"""Checkpoints for resuming: each is a model directory with a `state/` folder (train state, optimizer, config)."""

import dataclasses
import logging
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinystories import checkpoint
from tinystories.checkpoint import ModelFiles
from tinystories.config import Config, ModelConfig, SamplingConfig
from tinystories.config_file import build_dataclass, load_config, to_toml
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.torch_engine import load_weights
from tinystories.errors import UserError, quoted
from tinystories.files import TEMP_SUFFIX, atomic_directory, error_reason, sha256, write_errors, write_json
from tinystories.model import GPT
from tinystories.train.optimizer.build import Optimizers, flatten_optimizer_state, load_optimizer_state
from tinystories.train.step import TrainStep
from tinystories.train.teacher import TeacherRecord
from tinystories.weights.load import load_fp32
from tinystories.weights.names import POSITION_EMBEDDING

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainState:
    """Progress of a run, saved as state/clock.json. `step` is the number of completed optimizer steps."""

    step: int = 0
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of training steps, over all sessions
    best_step: int = -1  # of the best evaluation on the subset; -1: none yet
    best_bits_per_byte: float = float("inf")
    metrics_bytes: int = 0  # length of metrics.jsonl at this step
    samples_bytes: int = 0  # length of samples.md at this step
    recent_nats: float = 0.0  # running means: sums of loss, targets, seconds since the last line of metrics.jsonl
    recent_targets: int = 0
    recent_seconds: float = 0.0
    micro_batch: int = 0  # rows per forward pass; kept on resuming, since it determines the order of sums
    data_sha256: str = ""  # of train.bin
    data_dir: str = ""  # absolute path of the data; "": written by a version that did not store it
    teacher_dirs: tuple[str, ...] = ()  # absolute paths of the teachers in the settings
    teacher_sha256: tuple[str, ...] = ()  # of their weights; (): written by a version that did not store them
    init_dir: str = ""  # absolute path of the model in train.init, and the hash of its weights
    init_sha256: str = ""
    route: str = ""  # see train/route.py; "": begun with precision "auto" by a version without routes


def save_checkpoint(
    run_dir: Path, train_state: TrainState, train_step: TrainStep, tokenizer: Tokenizer, provenance: dict[str, Any]
) -> None:
    """Write the checkpoint of `train_state.step`, publish it in the run directory and prune old checkpoints.

    `UserError` if it cannot be written; the earlier checkpoints are then unharmed.
    """
    checkpoint_dir = checkpoint.checkpoint_folder(run_dir, train_state.step)
    try:
        with atomic_directory(checkpoint_dir, Path(f"{checkpoint_dir}{TEMP_SUFFIX}")) as staging_dir:
            checkpoint.write_model(staging_dir, train_step.model, tokenizer, SamplingConfig(), provenance)
            state_dir = staging_dir / "state"
            state_dir.mkdir()
            save_file(
                flatten_optimizer_state(train_step.model, train_step.optimizers), state_dir / "optimizer.safetensors"
            )
            (state_dir / "config.toml").write_text(to_toml(train_step.config), encoding="utf-8")
            record = dataclasses.asdict(train_state) | {"optimizer_sha256": sha256(state_dir / "optimizer.safetensors")}
            write_json(state_dir / "clock.json", record)
        checkpoint.publish(checkpoint_dir, run_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint_dir} could not be written ({error_reason(error)}); earlier checkpoints are intact:"
            " free some disk space, then continue with --resume"
        ) from None
    prune_checkpoints(run_dir, train_state.best_step, train_step.config.train.keep_checkpoints)


def prune_checkpoints(run_dir: Path, best_step: int, keep: int) -> None:
    """Remove checkpoints except the newest `keep` and the best, and leftover staging directories."""
    with write_errors(run_dir / "checkpoints"):
        for step, folder in checkpoint.list_checkpoints(run_dir)[:-keep]:
            if step != best_step:
                shutil.rmtree(folder)
        for staging_dir in (run_dir / "checkpoints").glob("*" + TEMP_SUFFIX):
            shutil.rmtree(staging_dir)


def find_latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest intact checkpoint, with a warning for each damaged one skipped.

    None if there is no checkpoint at all; `UserError` if there are some and all are damaged.
    """
    checkpoints = checkpoint.list_checkpoints(run_dir)
    for _, folder in reversed(checkpoints):
        try:
            checkpoint.read_model(folder)
            read_train_state(folder)
        except UserError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        return folder
    if checkpoints:
        raise UserError(f"{run_dir}/checkpoints: every checkpoint is damaged; remove {run_dir} to start over")
    return None


def describe_latest_checkpoint(run_dir: Path) -> str:
    """Return the clause of an error message that says how to resume a run."""
    folder = find_latest_checkpoint(run_dir)
    return f"continue from {folder} with --resume" if folder else "no checkpoint has been written yet"


def read_train_state(folder: Path) -> TrainState:
    """Return the train state of a checkpoint. `UserError` if its optimizer state does not match the checksum."""
    record = checkpoint.read_json(folder / "state" / "clock.json")
    path = folder / "state" / "optimizer.safetensors"
    if not path.is_file() or sha256(path) != record.pop("optimizer_sha256", None):
        raise UserError(f"{path} is missing or does not match its checksum")
    if "route" not in record:  # written by a version that had none
        precision = load_config(folder / "state" / "config.toml").train.precision
        record["route"] = "" if precision == "auto" else precision
    where = f"{folder}/state/clock.json"
    best = record.pop("best_bits_per_byte", math.inf)  # infinite until the first evaluation
    if type(best) is not float or math.isnan(best):
        raise UserError(f"{where}: best_bits_per_byte={quoted(best)} must be a number")
    train_state = build_dataclass(TrainState, record, where)
    train_state.best_bits_per_byte = best
    for name in ("step", "tokens", "metrics_bytes", "samples_bytes", "micro_batch"):
        if getattr(train_state, name) < 0:
            raise UserError(f"{where}: {name} must not be negative")
    return train_state


def read_teacher_records(folder: Path, train_state: TrainState) -> list[TeacherRecord]:
    """Return the teachers that a checkpoint with this train state was trained with; [] if they are not recorded."""
    names = load_config(folder / "state" / "config.toml").train.teacher
    if not len(names) == len(train_state.teacher_dirs) == len(train_state.teacher_sha256):
        return []
    return list(map(TeacherRecord, names, train_state.teacher_dirs, train_state.teacher_sha256))


def check_same_run(folder: Path, config: Config, is_same_data: bool) -> None:
    """Raise `UserError` if what must stay fixed differs from a checkpoint: model, seed, batch, optimizer kind, data."""
    old_settings = dataclasses.asdict(load_config(folder / "state" / "config.toml"))
    new_settings = dataclasses.asdict(config)
    fixed_settings = [("model", key) for key in new_settings["model"]]
    fixed_settings += [("train", "seed"), ("train", "batch_size"), ("optim", "kind")]
    for section, key in fixed_settings:
        old_value, new_value = old_settings[section][key], new_settings[section][key]
        if old_value != new_value:
            raise UserError(
                f"{section}.{key} is {new_value} but {folder} was trained with {old_value};"
                " resume with that value, or choose another --out"
            )
    if not is_same_data:
        raise UserError(
            f"--data {config.data.dir} is not the data that {folder} was trained on;"
            " pass the original --data, or choose another --out"
        )


def read_initial_model(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> ModelFiles:
    """Read the model directory from which a new run gets its weights (train.init).

    Context length and dropout may differ, and the vocabulary size may be left to the model. `UserError`, naming all of
    them, if the tokenizer or other settings differ, or if the directory has int8 weights only.
    """
    source = checkpoint.read_model(folder)
    problems = []
    if source.tokenizer().sha256 != tokenizer.sha256:
        command = f"tinystories prepare ... --tokenizer {shlex.quote(str(folder))}"
        problems.append(f"it has another tokenizer than the data, which must be prepared with: {command}")
    free_settings = {"n_ctx", "dropout"} | ({"vocab_size"} if config.vocab_size == 0 else set())
    source_settings, settings = dataclasses.asdict(source.config), dataclasses.asdict(config)
    differences = [name for name in settings if name not in free_settings and settings[name] != source_settings[name]]
    if differences:
        flags = " ".join(f"--model.{name} {to_flag(source_settings[name])}" for name in differences)
        values = ", ".join(f"{name}={to_flag(settings[name])}" for name in differences)
        problems.append(f"the config has other settings ({values}): use {flags}")
    if source.is_int8_only:
        problems.append("it has only int8 weights, which cannot be trained: use the unquantized model")
    if problems:
        raise UserError(f"--train.init {folder}: {'; '.join(problems)}")
    return source


def load_initial_weights(source: ModelFiles, model: GPT) -> None:
    """Copy the weights of `source`, from `read_initial_model`, into a new model.

    Learned position embeddings are cut to a shorter context. In a longer one, the further positions keep their random
    initialization, with a warning.
    """
    weights = {name: torch.tensor(weight) for name, weight in load_fp32(source).items()}
    if POSITION_EMBEDDING in weights:
        positions = model.state_dict()[POSITION_EMBEDDING].cpu().clone()
        learned = weights[POSITION_EMBEDDING][: len(positions)]
        if len(learned) < len(positions):
            log.warning(
                "%s has learned %d positions; those up to model.n_ctx=%d are initialized at random",
                source.folder,
                len(learned),
                len(positions),
            )
        positions[: len(learned)] = learned
        weights[POSITION_EMBEDDING] = positions
    model.load_state_dict(weights, strict=False)  # a tied head is not stored


def to_flag(value: object) -> str:
    """Return a setting as the text of a command line flag."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def load_weights_and_optimizers(folder: Path, model: GPT, optimizers: Optimizers) -> None:
    """Load a checkpoint into the model and the optimizers. `UserError` if it is damaged."""
    load_weights(checkpoint.read_model(folder), model)
    path = folder / "state" / "optimizer.safetensors"
    try:
        load_optimizer_state(model, optimizers, load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
