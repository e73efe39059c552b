"""A run from its command to its end: a place on the disk, the ranks, a checkpoint to go on from, signals."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from tinystories import checkpoint
from tinystories.config import Config, to_toml
from tinystories.engine.device import pick_device
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport
from tinystories.train import distributed, signals, state
from tinystories.train.display import Display
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted, Recent, Trainer
from tinystories.train.metrics import Metrics, truncate

log = logging.getLogger(__name__)


def train(config: Config, run: Path, *, resume: bool = False) -> BitsReport | None:
    """Train in `run` (a new directory, or with `resume` one that holds a run). Returns the final evaluation.

    Started by torchrun, this is one rank of several; `run` must be on a file system that all of them see.
    Raises `Interrupted` after SIGINT or SIGTERM, once the checkpoint is on the disk.
    """
    world = World.from_environment()
    if world.first:
        last = state.latest(run) if resume else None
        require_place(run, resume)
    try:
        with distributed.connected(world, pick_device(world.device(config.train.device))):
            step = world.of_first(checkpoint.step_of(last) if world.first and last else -1)
            stopped = None
            try:
                return train_on(config, run, checkpoint.folder_of(run, step) if step >= 0 else None, world)
            except Interrupted as interrupt:  # all ranks have agreed on it, and part as after a finished run
                stopped = interrupt
        raise stopped
    except distributed.Lost:
        good = state.latest(run)
        kept = f"go on from {good} with --resume" if good else "no checkpoint had been written yet"
        raise UserError(
            f"another process of this run has ended or cannot be reached (see what it said); {kept}"
        ) from None


def train_on(config: Config, run: Path, last: Path | None, world: World) -> BitsReport | None:
    """Train from the checkpoint `last`, or from the start."""
    trainer = Trainer(config, run, state.read_clock(last).micro_batch if last is not None else 0, world)
    if last is not None:
        require_same_run(state.read_config(last), trainer.config, last)
        data_sha256 = trainer.clock.data_sha256
        trainer.clock = state.restore(last, trainer.model, trainer.optimizers)
        trainer.clock.micro_batch = trainer.micro_batch
        if trainer.clock.data_sha256 != data_sha256:
            raise UserError(
                f"{config.data.dir} is not the data that {run} was trained on; give the same --data, or another --out"
            )
        clock = trainer.clock
        trainer.recent = Recent(clock.recent_nats, clock.recent_targets, clock.recent_seconds)
    elif config.train.init:
        state.begin_with(Path(config.train.init), trainer.model, trainer.tokenizer)
    if world.first:
        if last is not None:
            checkpoint.publish(last, run)  # a kill may have come between a checkpoint and its publication
        try:
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.toml").write_text(to_toml(trainer.config), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {run} cannot be written: {error.strerror}; name another directory") from None
        truncate(run / "samples.md", trainer.clock.samples_bytes)
    metrics = Metrics(
        run if world.first else None, resume_bytes=trainer.clock.metrics_bytes, tensorboard=config.train.tensorboard
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
    muon = f"Muon {optim.muon_rate:g} for the matrices of the blocks, " if optim.kind == "muon" else ""
    log.info("peak learning rates: %sAdamW %g", muon, optim.learning_rate)
    if last is not None:
        log.info("resuming at step %d of %d", trainer.clock.step, config.train.steps)
    with (
        contextlib.closing(metrics),
        signals.taken_by(stopping(trainer), deaf_after_errors=world.size > 1),
        trainer.prefetching(),
        Display(config.train.steps, trainer.clock.step, quiet=not world.first) as display,
    ):
        return trainer.loop(metrics, display)


def require_place(run: Path, resume: bool) -> None:
    """A run is written into an empty place, or goes on where one is."""
    if run.is_file():
        raise UserError(f"--out {run} is a file; name a directory")
    if not run.exists() or not any(run.iterdir()):
        return
    if not (run / "config.toml").exists():
        raise UserError(f"--out {run} holds something else than a training run; name another directory")
    if not resume:
        raise UserError(f"--out {run} already holds a training run; add --resume to go on, or name another directory")


def require_same_run(old: Config, new: Config, folder: Path) -> None:
    """Settings that decide which weights come out must not change on the way."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    fixed = [("model", key) for key in after["model"]]
    fixed += [("train", "seed"), ("train", "batch_size"), ("optim", "kind")]
    for section, key in fixed:
        was, now = before[section][key], after[section][key]
        if was != now:
            raise UserError(
                f"{section}.{key} is {now} but {folder} was trained with {was};"
                " resume with the same, or name another --out"
            )


def stopping(trainer: Trainer) -> Callable[[int], None]:
    """The first signal lets the step finish and saves; the second one ends at once."""

    def ask(number: int) -> None:
        if trainer.stop_signal and trainer.world.size == 1:  # torchrun sends its own second one, and kills in the end
            raise KeyboardInterrupt
        trainer.stop_signal = number
        log.info("stopping after this step and saving%s", "; once more to stop at once" * (trainer.world.size == 1))

    return ask
