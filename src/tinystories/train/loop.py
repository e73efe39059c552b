"""The training loop: steps, evaluations, checkpoints and metrics.

The step number is the only clock: the batch, learning rate and dropout seed of a step are functions of the seed and the
step. So an interrupted and resumed run ends with the same bits as an uninterrupted one.
"""

import contextlib
import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import tinystories
from tinystories.config import Config, SamplingConfig, replace_vocab
from tinystories.data.dataset import open_split
from tinystories.data.loader import PackedRows
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.device import select_device, select_precision
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport, read_prepared_stories, score_stories, summarize
from tinystories.generate.batching import generate
from tinystories.model import GPT
from tinystories.model.loss import Objective
from tinystories.train import distributed, state
from tinystories.train.display import Display
from tinystories.train.distributed import SINGLE, World
from tinystories.train.estimate import auto_micro_batch
from tinystories.train.inflight import InFlightStep
from tinystories.train.learning_rate import resolve_auto_rates
from tinystories.train.metrics import Metrics, plot_curves
from tinystories.train.optim import build_optimizers, consolidate_state
from tinystories.train.prefetch import Batch, Prefetch
from tinystories.train.schedule import get_learning_rate, get_momentum

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was stopped by the signal number `signum` at `step`; a checkpoint of that step has been saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
        self.signum, self.step = signum, step


class Trainer:
    """One process of a training run. Owns the model, optimizers and train state, which are equal on all ranks."""

    def __init__(self, config: Config, run_dir: Path, previous_micro_batch: int = 0, world: World = SINGLE) -> None:
        """Build everything a run needs: data, tokenizer, model, optimizers, objective.

        `previous_micro_batch` is the micro-batch of the run being resumed (0: none). With more than one rank, call this
        inside `distributed.process_group`.
        """
        data_dir = Path(config.data.dir)
        self.rows = PackedRows(data_dir, "train", config.model.n_ctx, config.train.seed)
        self.val_split = open_split(data_dir, "val")
        self.tokenizer = Tokenizer.load(data_dir)
        if self.tokenizer.sha256 != self.rows.meta.tokenizer_sha256:
            raise UserError(f"{data_dir}/tokenizer.json is not the tokenizer of the data; prepare the data again")
        self.config = config = resolve_auto_rates(replace_vocab(config, self.rows.meta.vocab_size, str(data_dir)))
        self.run_dir, self.world = run_dir, world
        self.device = select_device(world.resolve_device(config.train.device))
        self.precision = select_precision(self.device, config.train.precision)
        self.micro_batch = auto_micro_batch(config, self.device, previous_micro_batch, world)
        torch.manual_seed(config.train.seed)
        self.model = GPT(config.model).to(self.device)
        self.optimizers = build_optimizers(self.model, config.optim, config.train.shard_optimizer and world.size > 1)
        self.objective = distributed.wrap_ddp(self.maybe_compile(Objective(self.model)), world, self.device)
        self.train_state = state.TrainState(
            micro_batch=self.micro_batch, data_sha256=self.rows.meta.splits["train"].sha256
        )
        train_split = self.rows.meta.splits["train"]
        self.tokens_per_byte = (train_split.tokens - 1) / max(1, train_split.bytes)
        self.stop_signal = 0
        self.running_mean = RunningMean()
        self.prefetch: Prefetch | None = None
        self.in_flight: InFlightStep | None = None  # the newest step, until it is recorded
        self.last_recorded_at: float | None = None  # end of the latest recorded step; None while no step is in flight

    def maybe_compile(self, objective: Objective) -> Any:
        """Apply torch.compile if train.compile is "on", or if it is "auto" and the device is CUDA."""
        mode = self.config.train.compile
        if mode == "on" or (mode == "auto" and self.device.type == "cuda"):
            return torch.compile(objective)
        return objective

    def train_step(self, step: int) -> tuple[Tensor, Tensor, int, float]:
        """Run one optimizer step; return the mean loss, the gradient norm, the number of targets and the learning rate.

        The loss is in nats per target. Loss and gradient norm are scalars still on the device: reading them would make
        the host wait. All four are those of the whole batch, of which this rank computes its share.
        """
        config, world = self.config, self.world
        # The batch of this rank. n_targets counts the targets of all ranks.
        batch = self.prefetch.get(step) if self.prefetch else self.make_batch(step)
        (inputs, targets), n_targets = batch.to_device(self.device), batch.n_targets

        # Schedules: the learning rate of each parameter group, scaled from its peak, and Muon's momentum.
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = get_learning_rate(step, config.train.steps, group["peak"], config.schedule)
                if "momentum" in group:
                    group["momentum"] = get_momentum(step, config.train.steps, config.optim.momentum)
        lr = self.optimizers[0].param_groups[0]["lr"]

        # Dropout is seeded per step, so that resuming needs no saved generator state.
        if config.model.dropout:
            torch.manual_seed(derive_seed(config.train.seed, step, world.rank))

        # Gradient accumulation: backward passes over micro-batches add up in weight.grad.
        loss_sum = torch.zeros((), device=self.device)
        for start in range(0, len(inputs), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            # With several ranks, DDP all-reduces the gradients once, in the last backward pass.
            skip_sync = world.size > 1 and rows.stop < len(inputs)
            with self.objective.no_sync() if skip_sync else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = self.objective(inputs[rows], targets[rows])
                # `loss` is a sum over this micro-batch. Dividing it by the targets of the whole step, not of the
                # micro-batch, makes the accumulated gradient that of the batch mean, wherever the padding is.
                # DDP averages gradients over the ranks, but their sum is needed: hence the factor world.size.
                (loss / n_targets * world.size).backward()
            loss_sum += loss.detach()
        world.all_reduce_(loss_sum)  # only for the metrics: the gradients were reduced by DDP

        # Clip by the global norm over all weights, equal on all ranks. With grad_clip = 0 the norm is only measured.
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip or math.inf)

        # Optimizer step. Setting gradients to None frees their memory and saves the next backward pass an addition.
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss_sum / n_targets, grad_norm, n_targets, lr

    def make_batch(self, step: int) -> Batch:
        """Build this rank's batch of `step`; with CUDA in pinned memory."""
        pin_memory = self.device.type == "cuda"
        return Batch.from_rows(self.rows, step, self.config.train.batch_size, self.world, pin_memory)

    @contextlib.contextmanager
    def prefetch_batches(self) -> Iterator[None]:
        """Prefetch batches in a thread inside the block, from the current step on; does nothing on a CPU."""
        if not is_async_device(self.device):
            yield
            return
        with Prefetch(self.make_batch, self.train_state.step, self.config.train.steps) as self.prefetch:
            try:
                yield
            finally:
                self.prefetch = None

    def evaluate(self, limit: int, display: Display) -> BitsReport | None:
        """Return bits per byte on `limit` fixed validation stories (0: all); None if there are no validation stories.

        Each rank scores every `world.size`-th story. Raises `Interrupted` on all ranks if any of them got a signal.
        """
        tokens, index = self.val_split
        if len(index) < 2:
            return None
        engine = TorchEngine(self.model, device=self.device, precision=self.precision)
        world, n_stories = self.world, len(index) - 1
        n_evaluated = min(limit, n_stories) if limit else n_stories
        started_at = time.perf_counter()

        def report_progress(n_done: int) -> None:
            if self.stop_signal:
                raise Interrupted(self.stop_signal, self.train_state.step)
            n_done = min(n_evaluated, n_done * world.size)
            display.update(self.train_state.step, f"evaluating {n_done:,} of {n_evaluated:,} stories", log_line=False)

        # Each rank fills the columns of its own stories; summed over ranks they are complete. A signal ends the loop on
        # one rank only, so `Interrupted` is suppressed here and raised after all ranks have shared their signals.
        story_scores = np.zeros((3, n_evaluated))
        with contextlib.suppress(Interrupted):
            rank_stories = itertools.islice(read_prepared_stories(tokens, index, limit), world.rank, None, world.size)
            story_scores[:, world.rank :: world.size] = score_stories(engine, rank_stories, report_progress)
        self.sync_stop_signal()
        if self.stop_signal:
            raise Interrupted(self.stop_signal, self.train_state.step)
        return summarize(world.all_reduce_sum(story_scores), time.perf_counter() - started_at)

    def sync_stop_signal(self) -> None:
        """Share a stop signal that any rank received, so that all ranks stop at the same step."""
        self.stop_signal = self.world.all_reduce_max(self.stop_signal)

    def write_samples(self, metrics_text: str) -> None:
        """Append a story for each sample prompt to samples.md; fixed seeds make evaluations comparable."""
        engine = TorchEngine(self.model, device=self.device, precision=self.precision, n_slots=1)
        sections = [f"## Step {self.train_state.step:,} ({metrics_text})\n"]
        for i, prompt in enumerate(self.config.train.sample_prompts):
            story = generate(
                engine,
                self.tokenizer,
                prompt,
                settings=SamplingConfig(),
                seed=i,
                max_tokens=self.config.train.sample_tokens,
            )
            quote = "\n".join("> " + line for line in story.text.splitlines())
            sections.append(f"{quote}\n")
        with (self.run_dir / "samples.md").open("a", encoding="utf-8") as file:
            file.write("\n".join(sections) + "\n")

    def build_provenance(self, metrics: Metrics) -> dict[str, Any]:
        """Return the facts about the origin of the weights: versions, data, tokenizer, progress, seed.

        Includes the validation score only if this very step was evaluated.
        """
        meta, train_state = self.rows.meta, self.train_state
        facts: dict[str, Any] = {
            "code_version": tinystories.__version__,
            "torch": torch.__version__,
            "data_source": meta.source,
            "data_revision": meta.revision,
            "data_sha256": train_state.data_sha256,
            "tokenizer": meta.tokenizer,
            "tokenizer_sha256": meta.tokenizer_sha256,
            "step": train_state.step,
            "tokens_seen": train_state.tokens,
            "epochs": round(train_state.step * self.config.train.batch_size / self.rows.n_rows, 3),
            "train_seconds": round(train_state.seconds, 1),
            "seed": self.config.train.seed,
        }
        if self.config.train.init:
            facts["began_with"] = self.config.train.init
        for record in metrics.records[-3:]:  # a step has at most three: training, evaluation, final evaluation
            if record["step"] == train_state.step and "val_stories" in record:
                facts |= {name: record[name] for name in ("val_bits_per_byte", "val_stories")}
        return facts

    def save_checkpoint(self, metrics: Metrics) -> None:
        """Write a checkpoint of this step, with the current lengths of metrics.jsonl and samples.md."""
        assert self.in_flight is None, "drain first: only results known to be finite are saved"
        consolidate_state(self.optimizers)
        if not self.world.is_main:
            return
        self.train_state.metrics_bytes = metrics.flush_and_get_size()
        samples_path = self.run_dir / "samples.md"
        self.train_state.samples_bytes = samples_path.stat().st_size if samples_path.exists() else 0
        running_mean = self.running_mean
        self.train_state.recent_nats, self.train_state.recent_targets = running_mean.nats, running_mean.targets
        self.train_state.recent_seconds = running_mean.seconds
        state.save_checkpoint(
            self.run_dir,
            self.train_state,
            self.config,
            self.model,
            self.optimizers,
            self.tokenizer,
            self.build_provenance(metrics),
        )

    def train(self, metrics: Metrics, display: Display) -> BitsReport | None:
        """Train from the current step to the last, evaluate on all validation stories, save; return the final score."""
        config, train_state = self.config.train, self.train_state
        evaluation_due = self.world.is_main and train_state.step < config.steps and self.is_evaluation_due(metrics)
        # A checkpoint written by an interrupt before or during an evaluation: catch up on the evaluation first.
        if self.world.broadcast(evaluation_due):
            self.evaluate_and_save_if_due(metrics, display)
        while train_state.step < config.steps:
            self.launch_step(metrics, display)
            self.sync_stop_signal()
            if self.stop_signal:
                self.drain(metrics, display)
                self.save_checkpoint(metrics)
                raise Interrupted(self.stop_signal, train_state.step)
            self.evaluate_and_save_if_due(metrics, display)
        return self.finish(metrics, display)

    def launch_step(self, metrics: Metrics, display: Display) -> None:
        """Launch the next step, then record the previous one, so that the device is busy while the host waits.

        On a CPU a step is finished when its launch returns, and is recorded immediately.
        """
        train_state, previous = self.train_state, self.in_flight
        if self.last_recorded_at is None:
            self.last_recorded_at = time.perf_counter()
        loss, grad_norm, n_targets, lr = self.train_step(train_state.step)
        train_state.step += 1
        train_state.tokens += n_targets
        self.in_flight = InFlightStep(train_state.step, train_state.tokens, n_targets, lr, loss, grad_norm)
        if previous is not None:
            self.record_step(previous, metrics, display)
        if not is_async_device(self.device):
            self.record_step(self.in_flight, metrics, display)
            self.in_flight = None

    def drain(self, metrics: Metrics, display: Display) -> None:
        """Wait for the step in flight and record it; stop the clock until the next step is launched."""
        if self.in_flight is not None:
            self.record_step(self.in_flight, metrics, display)
        self.in_flight = self.last_recorded_at = None

    def record_step(self, in_flight: InFlightStep, metrics: Metrics, display: Display) -> None:
        """Wait for a launched step; add its loss and time to the running mean, and log if a log line is due.

        Its time runs from the end of the previous step, whatever the host did in between.
        """
        loss, grad_norm = in_flight.read()
        now = time.perf_counter()
        assert self.last_recorded_at is not None, "launch_step sets it"
        seconds, self.last_recorded_at = now - self.last_recorded_at, now
        self.train_state.seconds += seconds
        self.check_finite(in_flight.step, loss, grad_norm)
        self.running_mean.add(loss, grad_norm, in_flight.n_targets, seconds)
        if in_flight.step % self.config.train.log_every == 0 or in_flight.step == self.config.train.steps:
            self.log_metrics(in_flight, metrics, display)

    def is_evaluation_due(self, metrics: Metrics) -> bool:
        """Return whether this step calls for an evaluation that is not yet in metrics.jsonl."""
        step = self.train_state.step
        # A step has at most three records: training, evaluation, final evaluation.
        is_done = any(record["step"] == step and "evaluated" in record for record in metrics.records[-3:])
        return step > 0 and step % self.config.train.eval_every == 0 and not is_done

    def evaluate_and_save_if_due(self, metrics: Metrics, display: Display) -> None:
        """Evaluate and save a checkpoint if this step calls for it; `finish` evaluates the last step."""
        step, is_last = self.train_state.step, self.train_state.step == self.config.train.steps
        should_evaluate = not is_last and self.is_evaluation_due(metrics)
        should_save = is_last or step % self.config.train.checkpoint_every == 0
        if should_evaluate or should_save:
            self.drain(metrics, display)
        if should_evaluate:
            try:
                evaluation = self.evaluate(self.config.train.eval_stories, display)
            except Interrupted:
                self.save_checkpoint(metrics)
                raise
            should_save = self.record_evaluation(metrics, display, evaluation) or should_save
        if should_save:
            self.save_checkpoint(metrics)

    def finish(self, metrics: Metrics, display: Display) -> BitsReport | None:
        """Evaluate on the whole validation set, write the last samples and save the checkpoint with the final score.

        Return the evaluation, or None if an earlier process has already done this or there is no validation story.
        """
        if self.world.broadcast(bool(metrics.records) and bool(metrics.records[-1].get("final"))):
            return None
        display.print_line("evaluating on the whole validation set")
        evaluation = self.evaluate(0, display)
        self.record_evaluation(metrics, display, evaluation, final=True)
        self.save_checkpoint(metrics)
        return evaluation

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise `UserError` if the loss or the gradient norm is infinite or NaN."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        last_good = state.find_latest_checkpoint(self.run_dir)
        checkpoint_hint = (
            f"the last good checkpoint is {last_good}" if last_good else "no checkpoint has been written yet"
        )
        optim = self.config.optim
        muon_text = f" and optim.muon_rate={optim.muon_rate:g}" if optim.kind == "muon" else ""
        raise UserError(
            f"loss {loss} and gradient norm {grad_norm} at step {step} are not finite; {checkpoint_hint}."
            f" Lower optim.learning_rate={optim.learning_rate:g}{muon_text} (to a third), increase schedule.warmup,"
            " or set optim.grad_clip=1, and add --resume"
        )

    def log_metrics(self, in_flight: InFlightStep, metrics: Metrics, display: Display) -> None:
        """Write the means since the last log line to metrics.jsonl and the display, and start new means."""
        running_mean, self.running_mean = self.running_mean, RunningMean()
        if not self.world.is_main:
            return
        loss = running_mean.mean_loss()
        bits_per_byte = loss / math.log(2) * self.tokens_per_byte
        tokens_per_s = running_mean.targets / running_mean.seconds
        metrics.write(
            {
                "step": in_flight.step,
                "tokens": in_flight.tokens,
                "loss": loss,
                "bits_per_byte": bits_per_byte,
                "learning_rate": in_flight.learning_rate,
                "grad_norm": running_mean.grad_norm,
                "seconds": round(self.train_state.seconds, 3),
                "tokens_per_s": round(tokens_per_s, 1),
            }
        )
        memory_gb = measure_memory_bytes(self.device) / 1e9
        text = f"loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {tokens_per_s:,.0f} tokens/s  {memory_gb:.1f} GB"
        display.update(in_flight.step, text, log_line=True)

    def record_evaluation(
        self, metrics: Metrics, display: Display, evaluation: BitsReport | None, *, final: bool = False
    ) -> bool:
        """Write the evaluation, samples and the curve; return True if it is the best so far and not the final one."""
        train_state, is_best = self.train_state, False
        summary = "no validation stories"
        record: dict[str, Any] = {"step": train_state.step, "tokens": train_state.tokens, "evaluated": True}
        if evaluation is not None:
            # The best is chosen on the fixed subset; the final score is on the whole set and not comparable.
            is_best = evaluation.bits_per_byte < train_state.best_bits_per_byte
            if is_best and not final:
                train_state.best_step, train_state.best_bits_per_byte = train_state.step, evaluation.bits_per_byte
            summary = f"{evaluation.bits_per_byte:.4f} bits per byte on {evaluation.stories:,} validation stories"
            record |= {
                "val_bits_per_byte": evaluation.bits_per_byte,
                "val_nats_per_token": evaluation.nats_per_token,
                "val_stories": evaluation.stories,
            }
        if final:
            record["final"] = True
        if not self.world.is_main:
            return is_best and not final
        self.write_samples(summary)
        metrics.write(record)
        plot_curves(
            metrics.records,
            self.run_dir / "loss.png",
            f"{self.run_dir.name}: {self.config.model.n_params / 1e6:.1f}M parameters",
        )
        display.print_line(f"step {train_state.step}: {summary}")
        return is_best and not final


class RunningMean:
    """Sums of loss (nats), targets and seconds since the last log line."""

    def __init__(self, nats: float = 0.0, targets: int = 0, seconds: float = 0.0) -> None:
        self.nats, self.targets, self.seconds = nats, targets, seconds
        self.grad_norm = 0.0  # of the latest step

    def add(self, loss: float, grad_norm: float, n_targets: int, seconds: float) -> None:
        self.nats += loss * n_targets
        self.grad_norm = grad_norm
        self.targets += n_targets
        self.seconds += seconds

    def mean_loss(self) -> float:
        """Return the mean loss in nats per target."""
        return self.nats / self.targets


def derive_seed(seed: int, step: int, rank: int) -> int:
    """Return the dropout seed of a step and rank; a pure function, so resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, *[rank] * (rank > 0)]).generate_state(1, np.uint64)[0])


def is_async_device(device: torch.device) -> bool:
    """Return whether the host is free while the device computes. A step on the CPU keeps all its cores busy."""
    return device.type != "cpu"


def measure_memory_bytes(device: torch.device) -> int:
    """Return the resident memory of this process, or on CUDA the peak memory allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
