"""A run from its command to its end: a place on the disk, the ranks, a checkpoint to go on from, signals."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from tinystories import checkpoint
from tinystories.config import Config, to_toml
from tinystories.engine.device import select_device
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport
from tinystories.train import distributed, signals, state
from tinystories.train.display import Display
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted, RunningMean, Trainer
from tinystories.train.metrics import Metrics, truncate

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, *, resume: bool = False) -> BitsReport | None:
    """Train in `run` (a new directory, or with `resume` one that holds a run). Returns the final evaluation.

    Started by torchrun, this is one rank of several; `run` must be on a file system that all of them see.
    Raises `Interrupted` after SIGINT or SIGTERM, once the checkpoint is on the disk.
    """
    world = World.from_environment()
    if world.is_main:
        last_checkpoint = state.find_latest_checkpoint(run_dir) if resume else None
        check_run_dir(run_dir, resume)
    try:
        with distributed.process_group(world, select_device(world.resolve_device(config.train.device))):
            step = world.broadcast(
                checkpoint.checkpoint_step(last_checkpoint) if world.is_main and last_checkpoint else -1
            )
            interruption = None
            try:
                return train_rank(
                    config, run_dir, checkpoint.checkpoint_folder(run_dir, step) if step >= 0 else None, world
                )
            except Interrupted as interrupt:  # all ranks have agreed on it, and part as after a finished run
                interruption = interrupt
        raise interruption
    except distributed.PeerLost:
        last_good = state.find_latest_checkpoint(run_dir)
        resume_hint = f"go on from {last_good} with --resume" if last_good else "no checkpoint had been written yet"
        raise UserError(
            f"another process of this run has ended or cannot be reached (see what it said); {resume_hint}"
        ) from None


def train_rank(config: Config, run_dir: Path, last_checkpoint: Path | None, world: World) -> BitsReport | None:
    """Train from the checkpoint `last`, or from the start."""
    trainer = Trainer(
        config,
        run_dir,
        state.read_train_state(last_checkpoint).micro_batch if last_checkpoint is not None else 0,
        world,
    )
    if last_checkpoint is not None:
        check_same_run(state.read_config(last_checkpoint), trainer.config, last_checkpoint)
        data_sha256 = trainer.train_state.data_sha256
        trainer.train_state = state.restore_checkpoint(last_checkpoint, trainer.model, trainer.optimizers)
        trainer.train_state.micro_batch = trainer.micro_batch
        if trainer.train_state.data_sha256 != data_sha256:
            raise UserError(
                f"{config.data.dir} is not the data that {run_dir} was trained on; give the same --data, or another --out"
            )
        train_state = trainer.train_state
        trainer.running_mean = RunningMean(
            train_state.recent_nats, train_state.recent_targets, train_state.recent_seconds
        )
    elif config.train.init:
        state.initialize_from(Path(config.train.init), trainer.model, trainer.tokenizer)
    if world.is_main:
        if last_checkpoint is not None:
            checkpoint.publish(
                last_checkpoint, run_dir
            )  # a kill may have come between a checkpoint and its publication
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.toml").write_text(to_toml(trainer.config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {run_dir} cannot be written: {error.strerror}; name another directory") from None
        truncate(run_dir / "samples.md", trainer.train_state.samples_bytes)
    metrics = Metrics(
        run_dir if world.is_main else None,
        resume_bytes=trainer.train_state.metrics_bytes,
        tensorboard=config.train.tensorboard,
    )
    log.info(
        "%s parameters, %s rows of %d tokens an epoch, %s in %s",
        f"{trainer.config.model.n_params:,}",
        f"{trainer.rows.n_rows:,}",
        config.model.n_ctx,
        trainer.device if world.size == 1 else f"{world.size} processes, the first on {trainer.device}",
        trainer.precision,
    )
    optim = trainer.config.optim
    muon_text = f"Muon {optim.muon_rate:g} for the matrices of the blocks, " if optim.kind == "muon" else ""
    log.info("peak learning rates: %sAdamW %g", muon_text, optim.learning_rate)
    if last_checkpoint is not None:
        log.info("resuming at step %d of %d", trainer.train_state.step, config.train.steps)
    with (
        contextlib.closing(metrics),
        signals.handle_signals(make_signal_handler(trainer), ignore_after_error=world.size > 1),
        trainer.prefetch_batches(),
        Display(config.train.steps, trainer.train_state.step, quiet=not world.is_main) as display,
    ):
        return trainer.train(metrics, display)


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """A run is written into an empty place, or goes on where one is."""
    if run_dir.is_file():
        raise UserError(f"--out {run_dir} is a file; name a directory")
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "config.toml").exists():
        raise UserError(f"--out {run_dir} holds something else than a training run; name another directory")
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a training run; add --resume to go on, or name another directory"
        )


def check_same_run(old_config: Config, new_config: Config, checkpoint_dir: Path) -> None:
    """Settings that decide which weights come out must not change on the way."""
    old_settings, new_settings = dataclasses.asdict(old_config), dataclasses.asdict(new_config)
    fixed_settings = [("model", key) for key in new_settings["model"]]
    fixed_settings += [("train", "seed"), ("train", "batch_size"), ("optim", "kind")]
    for section, key in fixed_settings:
        old_value, new_value = old_settings[section][key], new_settings[section][key]
        if old_value != new_value:
            raise UserError(
                f"{section}.{key} is {new_value} but {checkpoint_dir} was trained with {old_value};"
                " resume with the same, or name another --out"
            )


def make_signal_handler(trainer: Trainer) -> Callable[[int], None]:
    """The first signal lets the step finish and saves; the second one ends at once."""

    def on_signal(signum: int) -> None:
        if trainer.stop_signal and trainer.world.size == 1:  # torchrun sends its own second one, and kills in the end
            raise KeyboardInterrupt
        trainer.stop_signal = signum
        log.info("stopping after this step and saving%s", "; once more to stop at once" * (trainer.world.size == 1))

    return on_signal
