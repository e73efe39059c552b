"""A training run from start to finish: output directory, process group, resuming from a checkpoint, signals."""

import contextlib
import logging
from pathlib import Path

from tinystories import checkpoint
from tinystories.config import Config
from tinystories.config_file import to_toml
from tinystories.engine.device import select_device
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport
from tinystories.files import hold_lock, write_atomic, write_errors
from tinystories.train import distributed, signals, state
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted, Trainer

log = logging.getLogger(__name__)

LOCK = ".lock"  # in a run directory, while a training runs there


def train(config: Config, run_dir: Path, *, resume: bool = False) -> BitsReport | None:
    """Train in `run_dir` and return the final evaluation; None without validation stories or if already finished.

    `run_dir` is new or empty, or holds a run to continue with `resume`; it is locked meanwhile. Under torchrun this
    process is one of several ranks, and `run_dir` must be on a file system that they share.
    Raises `Interrupted` after SIGINT or SIGTERM, once the checkpoint is saved; `UserError` for bad settings or files.
    """
    world = World.from_environment()
    with contextlib.ExitStack() as stack:
        if world.is_main:
            with write_errors(f"--out {run_dir}"):
                check_run_dir(run_dir, resume)
                stack.enter_context(hold_lock(run_dir / LOCK, "train"))
                check_run_dir(run_dir, resume)  # another training may have ended in the meantime
        return train_locked(config, run_dir, resume, world)


def train_locked(config: Config, run_dir: Path, resume: bool, world: World) -> BitsReport | None:
    """Train as `train` does, in a run directory that is checked and locked."""
    last_step = -1
    if world.is_main and resume and (last_checkpoint := state.find_latest_checkpoint(run_dir)):
        last_step = checkpoint.checkpoint_step(last_checkpoint)
    try:
        with distributed.process_group(world, select_device(world.resolve_device(config.train.device))):
            last_step = world.broadcast(last_step)
            try:
                return train_rank(
                    config, run_dir, checkpoint.checkpoint_folder(run_dir, last_step) if last_step >= 0 else None, world
                )
            except Interrupted as error:  # on all ranks, which leave the process group as after a finished run
                interruption = error
        raise interruption
    except distributed.PeerLost:
        raise UserError(
            "another process of this run has ended or cannot be reached (see its error message);"
            f" {state.describe_latest_checkpoint(run_dir)}"
        ) from None


def train_rank(config: Config, run_dir: Path, last_checkpoint: Path | None, world: World) -> BitsReport | None:
    """Train on this rank from `last_checkpoint`, or from the beginning if it is None; return the final evaluation."""
    trainer = Trainer(config, run_dir, last_checkpoint, world)
    if world.is_main:
        prepare_run_dir(trainer, last_checkpoint)
    config, optim = trainer.config, trainer.config.optim
    log.info(
        "%s parameters, %s rows of %d tokens per epoch, %s in %s",
        f"{config.model.n_params:,}",
        f"{trainer.rows.n_rows:,}",
        config.model.n_ctx,
        trainer.device if world.size == 1 else f"{world.size} processes, the first on {trainer.device}",
        trainer.take_step.precision,
    )
    muon_text = f"Muon {optim.muon_rate:g} for the block matrices, " if optim.kind == "muon" else ""
    log.info("peak learning rates: %sAdamW %g", muon_text, optim.learning_rate)
    if last_checkpoint is not None:
        log.info("resuming at step %d of %d", trainer.train_state.step, config.train.steps)
    with (
        signals.handle_signals(trainer.on_signal, ignore_after_error=world.size > 1),
        trainer.prefetch_batches(),
        trainer.open_recorder(),
    ):
        return trainer.train()


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raise `UserError` unless `run_dir` is new or empty, or holds a run and `resume` is set."""
    if run_dir.is_file():
        raise UserError(f"--out {run_dir} is a file; choose a directory")
    if not run_dir.exists() or not any(path.name != LOCK for path in run_dir.iterdir()):
        return
    if not (run_dir / "config.toml").exists():
        raise UserError(f"--out {run_dir} is neither empty nor a training run; choose another directory")
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a training run; add --resume to continue it, or choose another directory"
        )


def prepare_run_dir(trainer: Trainer, last_checkpoint: Path | None) -> None:
    """Bring the run directory to the state of `last_checkpoint`, and write the settings."""
    run_dir = trainer.run_dir
    with write_errors(f"--out {run_dir}"):
        if last_checkpoint is not None:
            # The earlier process may have been killed after writing a checkpoint and before publishing it.
            checkpoint.publish(last_checkpoint, run_dir)
        write_atomic(run_dir / "config.toml", to_toml(trainer.config))
