"""Metrics of a run: metrics.jsonl, the loss curve loss.png and TensorBoard."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from tinystories.errors import UserError
from tinystories.figure import plain_text, png_figure
from tinystories.files import append_text, os_errors, require_regular_file, write_errors
from tinystories.train.recording.side_work import SideWork


class Metrics:
    """Appends records to metrics.jsonl, one JSON object per line, and keeps all of them in `records`.

    `resume_bytes` is the length of the file at the checkpoint being resumed; anything after it is cut off. Without a
    `run_dir` nothing is read or written (ranks other than 0). `UserError` if the file is damaged or cannot be written.
    """

    def __init__(
        self, run_dir: Path | None, resume_bytes: int, side_work: SideWork, *, tensorboard: bool = False
    ) -> None:
        self.path = run_dir / "metrics.jsonl" if run_dir else Path(os.devnull)
        self.side_work = side_work
        if run_dir:
            require_regular_file(self.path)
        with write_errors(self.path):
            truncate(self.path, resume_bytes)
        self.records = read_records(self.path) if run_dir else []
        with write_errors(self.path):
            self.file = self.path.open("ab", buffering=0)  # a buffer would fail again when it is closed
        self.tensorboard_writer: Any = None
        if run_dir and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first_step = self.records[-1]["step"] + 1 if self.records else 0
            with side_work.attempt("tensorboard"):
                self.tensorboard_writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which must have a "step", to the file and to TensorBoard."""
        self.records.append(record)
        advice = "free some disk space, then continue with --resume"
        append_text(self.file, f"{json.dumps(record)}\n", self.path, advice)
        if self.tensorboard_writer is not None:
            with self.side_work.attempt("tensorboard"):
                for key, value in record.items():
                    if key != "step" and isinstance(value, int | float):
                        self.tensorboard_writer.add_scalar(key, value, record["step"])

    def get_step_records(self, step: int) -> list[dict[str, Any]]:
        """Return the records of `step`, which must be the current step of the run."""
        # No record has a later step.
        newest_first = itertools.takewhile(lambda record: record["step"] == step, reversed(self.records))
        return list(newest_first)[::-1]

    def flush_and_get_size(self) -> int:
        """Force the file to disk and return its length in bytes."""
        with write_errors(self.path):
            os.fsync(self.file.fileno())
            return self.path.stat().st_size

    def close(self) -> None:
        self.file.close()
        if self.tensorboard_writer is not None:
            with self.side_work.attempt("tensorboard"):
                self.tensorboard_writer.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; none if there is no file. `UserError` names a line that is damaged."""
    with os_errors(path):
        data = path.read_bytes() if path.exists() else b""
    return parse_records(data, path)


def parse_records(data: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the records in the contents of `path`. `UserError` names a line that is damaged."""
    records = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{path}: line {number} is damaged; remove that line, or the file, then resume")
        records.append(record)
    return records


def truncate(path: Path, size: int) -> None:
    """Shorten a file to `size` bytes if it is longer; do nothing if it does not exist."""
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot training and validation loss in bits per byte against tokens, and the learning rate below, as a PNG file."""
    train = [r for r in records if "bits_per_byte" in r]
    val = [r for r in records if "val_bits_per_byte" in r]
    tokens, bits = [r["tokens"] for r in train], [r["bits_per_byte"] for r in train]
    val_tokens, val_bits = [r["tokens"] for r in val], [r["val_bits_per_byte"] for r in val]
    with png_figure(path, (8, 5)) as figure:
        loss_axis, lr_axis = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        loss_axis.plot(tokens, bits, lw=0.8, color="#9ecae1", label="training")
        loss_axis.plot(val_tokens, val_bits, "o-", ms=3, color="#08519c", label="validation")
        if val:
            end, above = (val_tokens[-1], val_bits[-1]), (0, 6)
            loss_axis.annotate(f"{val_bits[-1]:.3f}", end, above, textcoords="offset points", ha="right")
            loss_axis.set_ylim(0.9 * min([*val_bits, *bits]), 2.5 * min(val_bits))
        loss_axis.set(ylabel="bits per byte", title=plain_text(title))
        loss_axis.grid(alpha=0.3)
        loss_axis.legend()
        lr_axis.plot(tokens, [r["learning_rate"] for r in train], lw=1, color="#636363")
        lr_axis.set(xlabel="training tokens", ylabel="learning rate")
        lr_axis.grid(alpha=0.3)
