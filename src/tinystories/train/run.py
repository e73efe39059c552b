"""A training run from start to finish: output directory, process group, resuming from a checkpoint, signals."""

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
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted, Trainer
from tinystories.train.metrics import truncate

log = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, *, resume: bool = False) -> BitsReport | None:
    """Train in `run_dir` and return the final evaluation; None without validation stories or if already finished.

    `run_dir` is new or empty, or holds a run to continue with `resume`. Under torchrun this process is one of several
    ranks, and `run_dir` must be on a file system that they share.
    Raises `Interrupted` after SIGINT or SIGTERM, once the checkpoint is saved; `UserError` for bad settings or files.
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
            except Interrupted as interrupt:  # on all ranks, which leave the process group as after a finished run
                interruption = interrupt
        raise interruption
    except distributed.PeerLost:
        last_good = state.find_latest_checkpoint(run_dir)
        resume_hint = f"continue from {last_good} with --resume" if last_good else "no checkpoint has been written yet"
        raise UserError(
            f"another process of this run has ended or cannot be reached (see its error message); {resume_hint}"
        ) from None


def train_rank(config: Config, run_dir: Path, last_checkpoint: Path | None, world: World) -> BitsReport | None:
    """Train on this rank from `last_checkpoint`, or from the beginning if it is None; return the final evaluation."""
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
                f"--data {config.data.dir} is not the data that {run_dir} was trained on;"
                " pass the original --data, or choose another --out"
            )
    elif config.train.init:
        state.initialize_from(Path(config.train.init), trainer.model, trainer.tokenizer)
    if world.is_main:
        if last_checkpoint is not None:
            # The earlier process may have been killed after writing a checkpoint and before publishing it.
            checkpoint.publish(last_checkpoint, run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.toml").write_text(to_toml(trainer.config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {run_dir} cannot be written: {error.strerror}; choose another directory") from None
        truncate(run_dir / "samples.md", trainer.train_state.samples_bytes)
    log.info(
        "%s parameters, %s rows of %d tokens per epoch, %s in %s",
        f"{trainer.config.model.n_params:,}",
        f"{trainer.rows.n_rows:,}",
        config.model.n_ctx,
        trainer.device if world.size == 1 else f"{world.size} processes, the first on {trainer.device}",
        trainer.take_step.precision,
    )
    optim = trainer.config.optim
    muon_text = f"Muon {optim.muon_rate:g} for the block matrices, " if optim.kind == "muon" else ""
    log.info("peak learning rates: %sAdamW %g", muon_text, optim.learning_rate)
    if last_checkpoint is not None:
        log.info("resuming at step %d of %d", trainer.train_state.step, config.train.steps)
    with (
        signals.handle_signals(make_signal_handler(trainer), ignore_after_error=world.size > 1),
        trainer.prefetch_batches(),
        trainer.open_recorder(quiet=not world.is_main),
    ):
        return trainer.train()


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raise `UserError` unless `run_dir` is new or empty, or holds a run and `resume` is set."""
    if run_dir.is_file():
        raise UserError(f"--out {run_dir} is a file; choose a directory")
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "config.toml").exists():
        raise UserError(f"--out {run_dir} is neither empty nor a training run; choose another directory")
    if not resume:
        raise UserError(
            f"--out {run_dir} already holds a training run; add --resume to continue it, or choose another directory"
        )


def check_same_run(old_config: Config, new_config: Config, checkpoint_dir: Path) -> None:
    """Raise `UserError` if a setting changed that must stay fixed on resuming: model, seed, batch or optimizer kind."""
    old_settings, new_settings = dataclasses.asdict(old_config), dataclasses.asdict(new_config)
    fixed_settings = [("model", key) for key in new_settings["model"]]
    fixed_settings += [("train", "seed"), ("train", "batch_size"), ("optim", "kind")]
    for section, key in fixed_settings:
        old_value, new_value = old_settings[section][key], new_settings[section][key]
        if old_value != new_value:
            raise UserError(
                f"{section}.{key} is {new_value} but {checkpoint_dir} was trained with {old_value};"
                " resume with that value, or choose another --out"
            )


def make_signal_handler(trainer: Trainer) -> Callable[[int], None]:
    """Return a signal handler: the first signal stops after the current step and saves, a second one immediately.

    With several processes a second signal changes nothing, because torchrun sends one of its own.
    """

    def on_signal(signum: int) -> None:
        if trainer.stop_signal and trainer.world.size == 1:  # torchrun repeats the signal, and finally kills
            raise KeyboardInterrupt
        trainer.stop_signal = signum
        hint = "; a second signal stops immediately" if trainer.world.size == 1 else ""
        log.info("stopping after this step and saving a checkpoint%s", hint)

    return on_signal
