"""The training loop: which step, evaluation or checkpoint is due, and when to stop.

The step number is the only clock: the batch, learning rate and dropout seed of a step are functions of the seed and the
step. So an interrupted and resumed run ends with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tinystories.checkpoint import read_model
from tinystories.config import Config, ModelConfig, replace_vocab
from tinystories.data.dataset import open_split
from tinystories.data.loader import PackedRows
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport, read_prepared_stories, score_stories, summarize
from tinystories.train import state
from tinystories.train.distributed import SINGLE, World
from tinystories.train.optimizer.build import consolidate_state
from tinystories.train.optimizer.learning_rate import resolve_auto_rates
from tinystories.train.prefetch import Batch, prefetch
from tinystories.train.recording.recorder import Recorder
from tinystories.train.state import TrainState
from tinystories.train.step import StepResult, TrainStep
from tinystories.train.teacher import find_teachers, find_unrecorded_model

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was stopped by the signal number `signum` at `step`; a checkpoint of that step has been saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
        self.signum, self.step = signum, step


class Trainer:
    """One process of a training run. Owns the model, optimizers and train state, which are equal on all ranks."""

    recorder: Recorder  # set inside `open_recorder`, which everything needs but single steps and batches

    def __init__(
        self, config: Config, run_dir: Path, last_checkpoint: Path | None = None, world: World = SINGLE
    ) -> None:
        """Build everything a run needs: data, tokenizer, model, optimizers, train state.

        They continue from `last_checkpoint`, or are new if it is None. With more than one rank, call this inside
        `distributed.process_group`. `UserError` if the checkpoint is damaged, or of other data or settings.
        """
        data_dir = Path(config.data.dir)
        self.rows = PackedRows(data_dir, "train", config.model.n_ctx, config.train.seed)
        self.val_split = open_split(data_dir, "val")
        self.tokenizer = Tokenizer.load(data_dir)
        if self.tokenizer.sha256 != self.rows.meta.tokenizer_sha256:
            raise UserError(f"{data_dir}/tokenizer.json is not the tokenizer of the data; prepare the data again")
        initial_model = None
        if config.train.init and last_checkpoint is not None:
            config = follow_vocab_size(config, read_model(last_checkpoint, verify_weights=False).config)
        elif config.train.init:
            init_dir = Path(find_unrecorded_model(config.train.init, "train.init", run_dir))
            initial_model = state.read_initial_model(init_dir, config.model, self.tokenizer)
            config = follow_vocab_size(config, initial_model.config)
        self.config = config = resolve_auto_rates(replace_vocab(config, self.rows.meta.vocab_size, str(data_dir)))
        self.run_dir, self.world = run_dir, world
        data_sha256 = self.rows.meta.splits["train"].sha256
        self.train_state = TrainState(data_sha256=data_sha256)
        previous_route = None
        if last_checkpoint is not None:
            self.train_state = state.read_train_state(last_checkpoint)
            previous_route = self.train_state.route
            state.check_same_run(last_checkpoint, config, is_same_data=self.train_state.data_sha256 == data_sha256)
        self.train_state.data_dir = os.path.abspath(data_dir)
        records = state.read_teacher_records(last_checkpoint, self.train_state) if last_checkpoint else []
        teachers = find_teachers(config.train.teacher, run_dir, records)
        self.train_state.teacher_dirs = tuple(teacher.folder for teacher in teachers)
        self.train_state.teacher_sha256 = tuple(teacher.weights_sha256 for teacher in teachers)
        if initial_model is not None:
            self.train_state.init_dir = os.path.abspath(initial_model.folder)
            self.train_state.init_sha256 = initial_model.weights_sha256
        self.take_step = TrainStep(
            config,
            self.tokenizer,
            world,
            previous_micro_batch=self.train_state.micro_batch,
            previous_route=previous_route,
            teacher_dirs=self.train_state.teacher_dirs,
        )
        self.train_state.micro_batch, self.train_state.route = self.take_step.micro_batch, self.take_step.route.name
        # None unless the processor or the settings made a resumed run change its route.
        self.left_route = previous_route if previous_route not in (None, "", self.train_state.route) else None
        self.device, self.model = self.take_step.device, self.take_step.model
        self.optimizers = self.take_step.optimizers
        if last_checkpoint is not None:
            state.load_weights_and_optimizers(last_checkpoint, self.model, self.optimizers)
        elif initial_model is not None:
            state.load_initial_weights(initial_model, self.model)
        # Received by this rank, and agreed on by all ranks: a signal may arrive while the ranks agree.
        self.received_signal = self.stop_signal = 0
        self.batches: Iterator[Batch] | None = None  # prefetched ones
        self.in_flight: StepResult | None = None  # the newest step, until it is recorded
        self.last_recorded_at: float | None = None  # end of the latest recorded step; None while no step is in flight

    @contextlib.contextmanager
    def open_recorder(self) -> Iterator[None]:
        """Record inside the block, from the current train state on."""
        self.recorder = Recorder(self.run_dir, self.take_step, self.train_state, self.rows, self.tokenizer)
        with contextlib.closing(self.recorder.metrics), self.recorder.display:
            yield

    @contextlib.contextmanager
    def prefetch_batches(self) -> Iterator[None]:
        """Prefetch batches in a thread inside the block, from the current step on; does nothing on a CPU."""
        if is_async_device(self.device):
            batches = prefetch(self.make_batch, self.train_state.step, self.config.train.steps)
            with contextlib.closing(batches) as self.batches:
                yield
        else:
            yield

    def make_batch(self, step: int) -> Batch:
        """Build this rank's batch of `step`; with CUDA in pinned memory."""
        pin_memory = self.device.type == "cuda"
        return Batch.from_rows(self.rows, step, self.config.train.batch_size, self.world, pin_memory)

    def train(self) -> BitsReport | None:
        """Train from the current step to the last, evaluate on all validation stories, save; return the final score."""
        config, train_state = self.config.train, self.train_state
        if self.left_route is not None and train_state.step < config.steps:
            self.recorder.record_route_change(self.left_route)
        evaluation_due = self.world.is_main and train_state.step < config.steps and self.is_evaluation_due()
        # A checkpoint written by an interrupt before or during an evaluation: catch up on the evaluation first.
        if self.world.broadcast(evaluation_due):
            self.evaluate_and_save_if_due()
        while train_state.step < config.steps:
            self.launch_step()
            self.sync_stop_signal()
            if self.stop_signal:
                self.drain()
                self.save_checkpoint()
                raise Interrupted(self.stop_signal, train_state.step)
            self.evaluate_and_save_if_due()
        return self.finish()

    def launch_step(self) -> None:
        """Launch the next step, then record the previous one, so that the device is busy while the host waits.

        On a CPU a step is finished when its launch returns, and is recorded immediately.
        """
        previous = self.in_flight
        if self.last_recorded_at is None:
            self.last_recorded_at = time.perf_counter()
        self.in_flight = self.train_step(self.train_state.step)
        self.train_state.step += 1
        if previous is not None:
            self.record_step(previous)
        if not is_async_device(self.device):
            self.record_step(self.in_flight)
            self.in_flight = None

    def train_step(self, step: int) -> StepResult:
        """Run one optimizer step on the batch of `step`, without waiting for the device."""
        batch = next(self.batches) if self.batches else self.make_batch(step)
        assert batch.step == step, f"step {batch.step} comes next, not {step}"
        return self.take_step(batch)

    def record_step(self, result: StepResult) -> None:
        """Wait for a launched step and record it. Raises `UserError` if its loss or gradient norm is not finite.

        Its time runs from the end of the previous step, whatever the host did in between.
        """
        loss, grad_norm = result.read()
        now = time.perf_counter()
        assert self.last_recorded_at is not None, "launch_step sets it"
        seconds, self.last_recorded_at = now - self.last_recorded_at, now
        self.check_finite(result.step, loss, grad_norm)
        self.recorder.record_step(result, loss, grad_norm, seconds)

    def drain(self) -> None:
        """Wait for the step in flight and record it; stop the clock until the next step is launched."""
        if self.in_flight is not None:
            self.record_step(self.in_flight)
        self.in_flight = self.last_recorded_at = None

    def is_evaluation_due(self) -> bool:
        """Return whether this step calls for an evaluation that is not yet in metrics.jsonl."""
        step = self.train_state.step
        return step > 0 and step % self.config.train.eval_every == 0 and not self.recorder.is_evaluated()

    def evaluate_and_save_if_due(self) -> None:
        """Evaluate and save a checkpoint if this step calls for it; `finish` evaluates the last step."""
        step, is_last = self.train_state.step, self.train_state.step == self.config.train.steps
        should_evaluate = not is_last and self.is_evaluation_due()
        should_save = is_last or step % self.config.train.checkpoint_every == 0
        if should_evaluate or should_save:
            self.drain()
        if should_evaluate:
            try:
                evaluation = self.evaluate(self.config.train.eval_stories)
            except Interrupted:
                self.save_checkpoint()
                raise
            should_save = self.recorder.record_evaluation(evaluation) or should_save
        if should_save:
            self.save_checkpoint()
        if should_evaluate:
            self.recorder.illustrate_evaluation(evaluation)

    def evaluate(self, limit: int) -> BitsReport | None:
        """Return bits per byte on `limit` fixed validation stories (0: all); None if there are no validation stories.

        Each rank scores every `world.size`-th story. Raises `Interrupted` on all ranks if any of them got a signal.
        """
        tokens, index = self.val_split
        if len(index) < 2:
            return None
        engine = self.take_step.make_engine()
        world, display, n_stories = self.world, self.recorder.display, len(index) - 1
        n_evaluated = min(limit, n_stories) if limit else n_stories
        started_at = time.perf_counter()

        def report_progress(n_done: int) -> None:
            if self.received_signal:
                raise Interrupted(self.received_signal, self.train_state.step)
            n_done = min(n_evaluated, n_done * world.size)
            display.update(self.train_state.step, f"evaluating {n_done:,} of {n_evaluated:,} stories", log_line=False)

        # Each rank fills the columns of its own stories; summed over ranks they are complete. A signal ends the loop on
        # one rank only, so `Interrupted` is suppressed here and raised after all ranks have shared their signals.
        story_scores = np.zeros((3, n_evaluated))
        with contextlib.suppress(Interrupted), self.take_step.route.matmuls():
            rank_stories = itertools.islice(read_prepared_stories(tokens, index, limit), world.rank, None, world.size)
            story_scores[:, world.rank :: world.size] = score_stories(engine, rank_stories, report_progress)
        self.sync_stop_signal()
        if self.stop_signal:
            raise Interrupted(self.stop_signal, self.train_state.step)
        report = summarize(world.all_reduce_sum(story_scores), time.perf_counter() - started_at)
        return dataclasses.replace(report, lost_text=self.rows.meta.lost_text)

    def finish(self) -> BitsReport | None:
        """Evaluate on the whole validation set, save the checkpoint with the final score and write the last samples.

        Return the evaluation, or None if an earlier process has already done this or there is no validation story.
        """
        if self.world.broadcast(self.recorder.is_finished()):
            return None
        self.recorder.display.print_line("evaluating on the whole validation set")
        evaluation = self.evaluate(0)
        self.recorder.record_evaluation(evaluation, final=True)
        self.save_checkpoint()
        self.recorder.illustrate_evaluation(evaluation)
        return evaluation

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this step, with the current lengths of metrics.jsonl and samples.md."""
        assert self.in_flight is None, "drain first: only results known to be finite are saved"
        consolidate_state(self.optimizers)
        if not self.world.is_main:
            return
        self.recorder.update_file_sizes()
        provenance = self.recorder.build_provenance()
        state.save_checkpoint(self.run_dir, self.train_state, self.take_step, self.tokenizer, provenance)

    def sync_stop_signal(self) -> None:
        """Share a stop signal that any rank received, so that all ranks stop at the same step."""
        self.stop_signal = self.world.all_reduce_max(self.received_signal)

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise `UserError` if the loss or the gradient norm is infinite or NaN."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        optim = self.config.optim
        muon_text = f" and optim.muon_rate={optim.muon_rate:g}" if optim.kind == "muon" else ""
        raise UserError(
            f"loss {loss} and gradient norm {grad_norm} at step {step} are not finite;"
            f" {state.describe_latest_checkpoint(self.run_dir)}."
            f" Lower optim.learning_rate={optim.learning_rate:g}{muon_text} (to a third), increase schedule.warmup,"
            " or set optim.grad_clip=1"
        )

    def on_signal(self, signum: int) -> None:
        """Handle a signal: the first one stops after the current step and saves, a second one immediately.

        With several processes a second signal changes nothing, because torchrun sends one of its own, and finally
        kills.
        """
        if self.received_signal and self.world.size == 1:
            raise KeyboardInterrupt
        self.received_signal = signum
        hint = "; a second signal stops immediately" if self.world.size == 1 else ""
        log.info("stopping after this step and saving a checkpoint%s", hint)


def follow_vocab_size(config: Config, model: ModelConfig) -> Config:
    """Return the config with the vocabulary size of a model, which may be padded, unless it has one already."""
    vocab_size = config.model.vocab_size or model.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def is_async_device(device: torch.device) -> bool:
    """Return whether the host is free while the device computes. A step on the CPU keeps all its cores busy."""
    return device.type != "cpu"
