"""Training: one clock, pure batches, checkpoints that a straight run and a resumed run reach with the same bits."""

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
from tinystories.data.loader import PackedRows
from tinystories.data.prepared import open_split
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.device import pick_device, pick_precision
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.evaluate.bits import BitsReport, prepared, report, scores
from tinystories.generate.stories import generate
from tinystories.model import GPT
from tinystories.model.loss import Objective
from tinystories.train import distributed, state
from tinystories.train.display import Display
from tinystories.train.distributed import ALONE, World
from tinystories.train.estimate import fitting_micro_batch
from tinystories.train.metrics import Metrics, draw
from tinystories.train.optim import build_optimizers, gather
from tinystories.train.pending import Pending
from tinystories.train.prefetch import Batch, Prefetch
from tinystories.train.rates import settled
from tinystories.train.schedule import learning_rate, momentum

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. `signal` is the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.signal, self.step = number, step


class Trainer:
    """One process of a training run: owns the model, its optimizers and the clock, which all ranks keep alike."""

    def __init__(self, config: Config, run: Path, micro_batch: int = 0, world: World = ALONE) -> None:
        """`micro_batch` is what an earlier sitting of this run used, if there was one.

        With more than one rank the caller has connected them.
        """
        folder = Path(config.data.dir)
        self.rows = PackedRows(folder, "train", config.model.n_ctx, config.train.seed)
        self.val = open_split(folder, "val")
        self.tokenizer = Tokenizer.load(folder)
        if self.tokenizer.sha256 != self.rows.meta.tokenizer_sha256:
            raise UserError(f"{folder}/tokenizer.json is not the one the data was made with; prepare the data again")
        self.config = config = settled(replace_vocab(config, self.rows.meta.vocab_size, str(folder)))
        self.run, self.world = run, world
        self.device = pick_device(world.device(config.train.device))
        self.precision = pick_precision(self.device, config.train.precision)
        self.micro_batch = fitting_micro_batch(config, self.device, micro_batch, world)
        torch.manual_seed(config.train.seed)
        self.model = GPT(config.model).to(self.device)
        self.optimizers = build_optimizers(self.model, config.optim, config.train.shard_optimizer and world.size > 1)
        self.objective = distributed.objective(self.compiled(Objective(self.model)), world, self.device)
        self.clock = state.Clock(micro_batch=self.micro_batch, data_sha256=self.rows.meta.splits["train"].sha256)
        train_split = self.rows.meta.splits["train"]
        self.tokens_per_byte = (train_split.tokens - 1) / max(1, train_split.bytes)
        self.stop_signal = 0
        self.recent = Recent()
        self.prefetch: Prefetch | None = None
        self.pending: Pending | None = None  # the newest step, if it has not been counted yet
        self.counted_at: float | None = None  # when the time before was counted; None while no step is under way

    def compiled(self, objective: Objective) -> Any:
        wanted = self.config.train.compile
        if wanted == "on" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.compile(objective)
        return objective

    def train_step(self, step: int) -> tuple[Tensor, Tensor, int, float]:
        """Mean loss in nats per target, gradient norm (both still on the device), targets, learning rate.

        All of them over the whole batch, of which this rank computes its share.
        """
        config, world = self.config, self.world
        batch = self.prefetch.take(step) if self.prefetch else self.batch(step)
        (inputs, targets), n_targets = batch.on(self.device), batch.n_targets
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.train.steps, group["peak"], config.schedule)
                if "momentum" in group:
                    group["momentum"] = momentum(step, config.train.steps, config.optim.momentum)
        rate = self.optimizers[0].param_groups[0]["lr"]
        if config.model.dropout:
            torch.manual_seed(hash_seed(config.train.seed, step, world.rank))
        total = torch.zeros((), device=self.device)
        for start in range(0, len(inputs), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            apart = world.size > 1 and part.stop < len(inputs)  # gradients meet in the last backward pass only
            with self.objective.no_sync() if apart else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = self.objective(inputs[part], targets[part])
                (loss / n_targets * world.size).backward()  # DDP averages what is to be summed
            total += loss.detach()
        world.add_up(total)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.grad_clip or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total / n_targets, norm, n_targets, rate

    def batch(self, step: int) -> Batch:
        pinned = self.device.type == "cuda"
        return Batch.of(self.rows, step, self.config.train.batch_size, self.world, pinned)

    @contextlib.contextmanager
    def prefetching(self) -> Iterator[None]:
        """While it lasts, a thread makes the batches of the steps to come, in order, if that saves time."""
        if not works_beside_the_host(self.device):
            yield
            return
        with Prefetch(self.batch, self.clock.step, self.config.train.steps) as self.prefetch:
            try:
                yield
            finally:
                self.prefetch = None

    def evaluate(self, limit: int, display: Display) -> BitsReport | None:
        """Bits per byte on `limit` fixed validation stories (0: on all); None where there are none."""
        tokens, index = self.val
        if len(index) < 2:
            return None
        engine = TorchEngine(self.model, device=self.device, precision=self.precision)
        world, n_stories = self.world, len(index) - 1
        wanted = min(limit, n_stories) if limit else n_stories
        began = time.perf_counter()

        def progress(done: int) -> None:
            if self.stop_signal:
                raise Interrupted(self.stop_signal, self.clock.step)
            done = min(wanted, done * world.size)
            display.update(self.clock.step, f"evaluating {done:,} of {wanted:,} stories", line=False)

        found = np.zeros((3, wanted))
        with contextlib.suppress(Interrupted):
            share = itertools.islice(prepared(tokens, index, limit), world.rank, None, world.size)
            found[:, world.rank :: world.size] = scores(engine, share, progress)
        self.agree_on_stopping()
        if self.stop_signal:
            raise Interrupted(self.stop_signal, self.clock.step)
        return report(world.summed(found), time.perf_counter() - began)

    def agree_on_stopping(self) -> None:
        """A signal that one rank was sent stops all of them at the same step."""
        self.stop_signal = self.world.highest(self.stop_signal)

    def sample(self, metrics_text: str) -> None:
        """Append a story for each prompt to samples.md; the seeds are fixed so that evaluations compare."""
        engine = TorchEngine(self.model, device=self.device, precision=self.precision, n_slots=1)
        parts = [f"## Step {self.clock.step:,} ({metrics_text})\n"]
        for i, prompt in enumerate(self.config.train.sample_prompts):
            story = generate(
                engine,
                self.tokenizer,
                prompt,
                settings=SamplingConfig(),
                seed=i,
                max_tokens=self.config.train.sample_tokens,
            )
            quoted = "\n".join("> " + line for line in story.text.splitlines())
            parts.append(f"{quoted}\n")
        with (self.run / "samples.md").open("a", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")

    def provenance(self, metrics: Metrics) -> dict[str, Any]:
        """Where the weights come from; the score is that of this very step, or absent."""
        meta, clock = self.rows.meta, self.clock
        facts: dict[str, Any] = {
            "code_version": tinystories.__version__,
            "torch": torch.__version__,
            "data_source": meta.source,
            "data_revision": meta.revision,
            "data_sha256": clock.data_sha256,
            "tokenizer": meta.tokenizer,
            "tokenizer_sha256": meta.tokenizer_sha256,
            "step": clock.step,
            "tokens_seen": clock.tokens,
            "epochs": round(clock.step * self.config.train.batch_size / self.rows.n_rows, 3),
            "train_seconds": round(clock.seconds, 1),
            "seed": self.config.train.seed,
        }
        if self.config.train.init:
            facts["began_with"] = self.config.train.init
        for record in metrics.records[-3:]:
            if record["step"] == clock.step and "val_stories" in record:
                facts |= {name: record[name] for name in ("val_bits_per_byte", "val_stories")}
        return facts

    def save(self, metrics: Metrics) -> None:
        """Checkpoint this step, with the lengths of the files that are appended to."""
        assert self.pending is None, "what is saved has been found finite"
        gather(self.optimizers)
        if not self.world.first:
            return
        self.clock.metrics_bytes = metrics.size()
        samples = self.run / "samples.md"
        self.clock.samples_bytes = samples.stat().st_size if samples.exists() else 0
        recent = self.recent
        self.clock.recent_nats, self.clock.recent_targets = recent.nats, recent.targets
        self.clock.recent_seconds = recent.seconds
        state.save(
            self.run, self.clock, self.config, self.model, self.optimizers, self.tokenizer, self.provenance(metrics)
        )

    def loop(self, metrics: Metrics, display: Display) -> BitsReport | None:
        """Train from where the clock stands to the last step, evaluate on everything, save; returns the final score."""
        config, clock = self.config.train, self.clock
        due = self.world.first and clock.step < config.steps and self.evaluation_is_due(metrics)
        if self.world.of_first(due):  # interrupted before or during it
            self.milestone(metrics, display)
        while clock.step < config.steps:
            self.advance(metrics, display)
            self.agree_on_stopping()
            if self.stop_signal:
                self.catch_up(metrics, display)
                self.save(metrics)
                raise Interrupted(self.stop_signal, clock.step)
            self.milestone(metrics, display)
        return self.finish(metrics, display)

    def advance(self, metrics: Metrics, display: Display) -> None:
        """Launch the next step, then count the one before: a device has work while the host waits for its results.

        A CPU has done a step when it is launched, and counts it at once.
        """
        clock, before = self.clock, self.pending
        if self.counted_at is None:
            self.counted_at = time.perf_counter()
        loss, norm, n_targets, rate = self.train_step(clock.step)
        clock.step += 1
        clock.tokens += n_targets
        self.pending = Pending(clock.step, clock.tokens, n_targets, rate, loss, norm)
        if before is not None:
            self.count(before, metrics, display)
        if not works_beside_the_host(self.device):
            self.count(self.pending, metrics, display)
            self.pending = None

    def catch_up(self, metrics: Metrics, display: Display) -> None:
        """Wait until all is done that was launched, and count it; time does not run until the next step."""
        if self.pending is not None:
            self.count(self.pending, metrics, display)
        self.pending = self.counted_at = None

    def count(self, pending: Pending, metrics: Metrics, display: Display) -> None:
        """Wait for a launched step; add up its loss and time, and write the line that is due.

        Its time is that since the step before was done, whatever the host did meanwhile.
        """
        loss, norm = pending.read()
        now = time.perf_counter()
        assert self.counted_at is not None, "set when the step was launched"
        seconds, self.counted_at = now - self.counted_at, now
        self.clock.seconds += seconds
        self.require_finite(pending.step, loss, norm)
        self.recent.add(loss, norm, pending.n_targets, seconds)
        if pending.step % self.config.train.log_every == 0 or pending.step == self.config.train.steps:
            self.record(pending, metrics, display)

    def evaluation_is_due(self, metrics: Metrics) -> bool:
        """Whether this step has an evaluation that metrics.jsonl does not hold yet."""
        step = self.clock.step
        done = any(record["step"] == step and "evaluated" in record for record in metrics.records[-3:])
        return step > 0 and step % self.config.train.eval_every == 0 and not done

    def milestone(self, metrics: Metrics, display: Display) -> None:
        """Evaluate and save where the step asks for it; the last step's evaluation is `finish`."""
        step, last = self.clock.step, self.clock.step == self.config.train.steps
        evaluates = not last and self.evaluation_is_due(metrics)
        saves = last or step % self.config.train.checkpoint_every == 0
        if evaluates or saves:
            self.catch_up(metrics, display)
        if evaluates:
            try:
                report = self.evaluate(self.config.train.eval_stories, display)
            except Interrupted:
                self.save(metrics)
                raise
            saves = self.record_evaluation(metrics, display, report) or saves
        if saves:
            self.save(metrics)

    def finish(self, metrics: Metrics, display: Display) -> BitsReport | None:
        """The whole validation set, the last samples, and the checkpoint that carries the score."""
        if self.world.of_first(bool(metrics.records) and bool(metrics.records[-1].get("final"))):
            return None
        display.say("evaluating on the whole validation set")
        report = self.evaluate(0, display)
        self.record_evaluation(metrics, display, report, final=True)
        self.save(metrics)
        return report

    def require_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        good = state.latest(self.run)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
        optim = self.config.optim
        muon = f" and optim.muon_rate={optim.muon_rate:g}" if optim.kind == "muon" else ""
        raise UserError(
            f"loss {loss} and gradient norm {norm} at step {step} are not finite; {kept}."
            f" Lower optim.learning_rate={optim.learning_rate:g}{muon} (to a third), lengthen schedule.warmup,"
            " or set optim.grad_clip=1"
        )

    def record(self, pending: Pending, metrics: Metrics, display: Display) -> None:
        recent, self.recent = self.recent, Recent()
        if not self.world.first:
            return
        loss = recent.loss()
        bits = loss / math.log(2) * self.tokens_per_byte
        speed = recent.targets / recent.seconds
        metrics.write(
            {
                "step": pending.step,
                "tokens": pending.tokens,
                "loss": loss,
                "bits_per_byte": bits,
                "learning_rate": pending.rate,
                "grad_norm": recent.norm,
                "seconds": round(self.clock.seconds, 3),
                "tokens_per_s": round(speed, 1),
            }
        )
        memory = memory_bytes(self.device) / 1e9
        text = f"loss {loss:.4f}  {bits:.3f} bits/byte  {speed:,.0f} tokens/s  {memory:.1f} GB"
        display.update(pending.step, text, line=True)

    def record_evaluation(
        self, metrics: Metrics, display: Display, report: BitsReport | None, *, final: bool = False
    ) -> bool:
        """Write an evaluation, samples and the curve; True when it is the best so far."""
        clock, best = self.clock, False
        note = "no validation stories"
        record: dict[str, Any] = {"step": clock.step, "tokens": clock.tokens, "evaluated": True}
        if report is not None:
            best = report.bits_per_byte < clock.best_bits_per_byte  # of the fixed subset; the final score is of all
            if best and not final:
                clock.best_step, clock.best_bits_per_byte = clock.step, report.bits_per_byte
            note = f"{report.bits_per_byte:.4f} bits per byte on {report.stories:,} validation stories"
            record |= {
                "val_bits_per_byte": report.bits_per_byte,
                "val_nats_per_token": report.nats_per_token,
                "val_stories": report.stories,
            }
        if final:
            record["final"] = True
        if not self.world.first:
            return best and not final
        self.sample(note)
        metrics.write(record)
        draw(
            metrics.records,
            self.run / "loss.png",
            f"{self.run.name}: {self.config.model.n_params / 1e6:.1f}M parameters",
        )
        display.say(f"step {clock.step}: {note}")
        return best and not final


class Recent:
    """Sums since the last log line."""

    def __init__(self, nats: float = 0.0, targets: int = 0, seconds: float = 0.0) -> None:
        self.nats, self.targets, self.seconds = nats, targets, seconds
        self.norm = 0.0  # of the newest step

    def add(self, loss: float, norm: float, n_targets: int, seconds: float) -> None:
        self.nats += loss * n_targets
        self.norm = norm
        self.targets += n_targets
        self.seconds += seconds

    def loss(self) -> float:
        return self.nats / self.targets


def hash_seed(seed: int, step: int, rank: int) -> int:
    """A seed for dropout that is a function of the step, so that resuming needs no generator state."""
    return int(np.random.SeedSequence([seed, step, *[rank] * (rank > 0)]).generate_state(1, np.uint64)[0])


def works_beside_the_host(device: torch.device) -> bool:
    """Whether the host has time to make a batch while the device computes. A CPU's step keeps all its cores busy."""
    return device.type != "cpu"


def memory_bytes(device: torch.device) -> int:
    """Resident size of this process, or the peak allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
