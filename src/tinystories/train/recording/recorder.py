"""What a run leaves besides checkpoints: metrics, the loss curve, samples, provenance, and the progress display."""

import math
import re
from pathlib import Path
from typing import Any

import psutil
import torch

import tinystories
from tinystories.data.loader import PackedRows
from tinystories.data.text_loss import describe_loss, mark_incomparable
from tinystories.data.tokenizer import Tokenizer
from tinystories.evaluate.bits import BitsReport
from tinystories.files import require_regular_file, write_errors
from tinystories.generate.batching import Request, generate_all
from tinystories.progress import StepDisplay
from tinystories.train.recording.metrics import Metrics, plot_curves, truncate
from tinystories.train.recording.side_work import SideWork
from tinystories.train.state import TrainState
from tinystories.train.step import StepResult, TrainStep

SECTION_HEADER = re.compile(rb"^## Step ([\d,]+) ", re.MULTILINE)  # in samples.md; lines of stories begin with ">"


class Recorder:
    """Records the steps and evaluations of a run in its directory.

    It adds up tokens, times and losses, and keeps the best score and the lengths of the files, in `train_state`. On
    ranks other than 0 it writes and shows nothing, but keeps the same state.
    """

    def __init__(
        self, run_dir: Path, train_step: TrainStep, train_state: TrainState, rows: PackedRows, tokenizer: Tokenizer
    ) -> None:
        """Cut metrics.jsonl and samples.md back to what they held at the step of `train_state`."""
        self.run_dir, self.train_step, self.train_state = run_dir, train_step, train_state
        self.rows, self.tokenizer = rows, tokenizer
        self.config, self.is_main = train_step.config, train_step.world.is_main
        self.side_work = SideWork()
        self.metrics = Metrics(
            run_dir if self.is_main else None,
            train_state.metrics_bytes,
            self.side_work,
            tensorboard=self.config.train.tensorboard,
        )
        self.display = StepDisplay(self.config.train.steps, train_state.step, quiet=not self.is_main)
        self.samples_path = run_dir / "samples.md"
        if self.is_main:
            with self.side_work.attempt("samples.md"):
                cut_samples(self.samples_path, train_state.step if self.is_evaluated() else train_state.step - 1)
        train_split = rows.meta.splits["train"]
        self.tokens_per_byte = (train_split.tokens - 1) / max(1, train_split.bytes)

    def record_step(self, result: StepResult, loss: float, grad_norm: float, seconds: float) -> None:
        """Add a finished step that took `seconds` to the totals; write and reset the means if a log line is due."""
        train_state = self.train_state
        train_state.tokens += result.n_targets
        train_state.seconds += seconds
        train_state.recent_nats += loss * result.n_targets
        train_state.recent_targets += result.n_targets
        train_state.recent_seconds += seconds
        if result.step % self.config.train.log_every and result.step != self.config.train.steps:
            return
        if self.is_main:
            self.log_metrics(result, grad_norm)
        train_state.recent_nats, train_state.recent_targets, train_state.recent_seconds = 0.0, 0, 0.0

    def log_metrics(self, result: StepResult, grad_norm: float) -> None:
        """Write the means since the last log line to metrics.jsonl and the display."""
        train_state = self.train_state
        loss = train_state.recent_nats / train_state.recent_targets
        bits_per_byte = loss / math.log(2) * self.tokens_per_byte
        tokens_per_s = train_state.recent_targets / train_state.recent_seconds
        self.metrics.write(
            {
                "step": result.step,
                "tokens": train_state.tokens,
                "loss": loss,
                "bits_per_byte": bits_per_byte,
                "learning_rate": result.learning_rate,
                "grad_norm": grad_norm,
                "seconds": round(train_state.seconds, 3),
                "tokens_per_s": round(tokens_per_s, 1),
            }
        )
        memory_gb = measure_memory_bytes(self.train_step.device) / 1e9
        mark = " (not comparable)" if self.rows.meta.lost_text else ""
        text = f"loss {loss:.4f}  {bits_per_byte:.3f} bits/byte{mark}  {tokens_per_s:,.0f} tokens/s  {memory_gb:.1f} GB"
        self.display.update(result.step, text, log_line=True)

    def record_route_change(self, left_route: str) -> None:
        """Mark in metrics.jsonl that a resumed run continues on another route than `left_route`."""
        state = self.train_state
        if self.is_main:
            record = {"step": state.step, "tokens": state.tokens, "route": state.route, "left_route": left_route}
            self.metrics.write(record)

    def is_evaluated(self) -> bool:
        """Return whether the evaluation of the current step is already in metrics.jsonl."""
        return any("evaluated" in record for record in self.metrics.get_step_records(self.train_state.step))

    def is_finished(self) -> bool:
        """Return whether the latest record is a final evaluation, so that the run has nothing left to do."""
        records = self.metrics.records
        return bool(records) and bool(records[-1].get("final"))

    def record_evaluation(self, evaluation: BitsReport | None, *, final: bool = False) -> bool:
        """Write the evaluation to metrics.jsonl; return True if it is the best so far and not the final one."""
        train_state, is_best, lost_text = self.train_state, False, self.rows.meta.lost_text
        record: dict[str, Any] = {"step": train_state.step, "tokens": train_state.tokens, "evaluated": True}
        if evaluation is not None:
            # The best is chosen on the fixed subset; the final score is on the whole set and not comparable.
            is_best = evaluation.bits_per_byte < train_state.best_bits_per_byte
            if is_best and not final:
                train_state.best_step, train_state.best_bits_per_byte = train_state.step, evaluation.bits_per_byte
            record |= {
                "val_bits_per_byte": evaluation.bits_per_byte,
                "val_nats_per_token": evaluation.nats_per_token,
                "val_stories": evaluation.stories,
            }
            if lost_text:
                record["val_lost_text"] = lost_text
        if final:
            record["final"] = True
        if self.is_main:
            self.metrics.write(record)
            self.display.print_line(f"step {train_state.step}: {describe_evaluation(evaluation)}")
        return is_best and not final

    def illustrate_evaluation(self, evaluation: BitsReport | None) -> None:
        """Write samples and the curve, after the checkpoint: they may fail, or take the process down."""
        if not self.is_main:
            return
        with self.side_work.attempt("samples.md"):
            self.write_samples(describe_evaluation(evaluation))
        title = f"{self.run_dir.name}: {self.config.model.n_params / 1e6:.1f}M parameters"
        title = "\n".join(filter(None, (title, describe_loss(self.rows.meta.lost_text))))
        with self.side_work.attempt("loss.png"):
            plot_curves(self.metrics.records, self.run_dir / "loss.png", title)

    def write_samples(self, metrics_text: str) -> None:
        """Append a story for each sample prompt to samples.md; fixed seeds make evaluations comparable."""
        prompts, max_tokens = self.config.train.sample_prompts, self.config.train.sample_tokens
        requests = [Request(prompt=prompt, max_tokens=max_tokens, seed=i) for i, prompt in enumerate(prompts)]
        sections = [f"## Step {self.train_state.step:,} ({metrics_text})\n"]
        for story in generate_all(self.train_step.make_engine(), self.tokenizer, requests):
            sections.append("\n".join("> " + line for line in story.text.splitlines()) + "\n")
        size = self.samples_path.stat().st_size if self.samples_path.exists() else 0
        require_regular_file(self.samples_path)
        try:
            with self.samples_path.open("a", encoding="utf-8") as file:
                file.write("\n".join(sections) + "\n")
        except OSError:
            truncate(self.samples_path, size)
            raise

    def update_file_sizes(self) -> None:
        """Force metrics.jsonl to disk; store its length and that of samples.md in the train state."""
        self.train_state.metrics_bytes = self.metrics.flush_and_get_size()
        with write_errors(self.samples_path):
            self.train_state.samples_bytes = self.samples_path.stat().st_size if self.samples_path.exists() else 0

    def build_provenance(self) -> dict[str, Any]:
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
        if self.config.train.teacher:
            facts["teachers"] = list(self.config.train.teacher)
        for record in self.metrics.get_step_records(train_state.step):
            if "val_stories" in record:
                names = ("val_bits_per_byte", "val_stories", "val_lost_text")
                facts |= {name: record[name] for name in names if name in record}
        return facts


def describe_evaluation(evaluation: BitsReport | None) -> str:
    if evaluation is None:
        return "no validation stories"
    score = f"{evaluation.bits_per_byte:.4f} bits per byte on {evaluation.stories:,} validation stories"
    return mark_incomparable(score, evaluation.lost_text)


def cut_samples(path: Path, last_step: int) -> None:
    """Cut samples.md at its first section of a step after `last_step`."""
    require_regular_file(path)
    for header in SECTION_HEADER.finditer(path.read_bytes() if path.exists() else b""):
        if int(header[1].replace(b",", b"")) > last_step:
            truncate(path, header.start())
            return


def measure_memory_bytes(device: torch.device) -> int:
    """Return the resident memory of this process, or on CUDA the peak memory allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
