"""Metrics of a run: metrics.jsonl, the loss curve loss.png and TensorBoard."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from tinystories.files import atomic_file


class Metrics:
    """Appends records to metrics.jsonl, one JSON object per line, and keeps all of them in `records`.

    `resume_bytes` is the length of the file at the checkpoint being resumed; anything after it is cut off. Without a
    `run_dir` nothing is read or written (ranks other than 0).
    """

    def __init__(self, run_dir: Path | None, resume_bytes: int, *, tensorboard: bool = False) -> None:
        self.path = run_dir / "metrics.jsonl" if run_dir else Path(os.devnull)
        truncate(self.path, resume_bytes)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard_writer = None
        if run_dir and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first_step = self.records[-1]["step"] + 1 if self.records else 0
            self.tensorboard_writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which must have a "step", to the file and to TensorBoard."""
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.tensorboard_writer is not None:
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
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self.file.close()
        if self.tensorboard_writer is not None:
            self.tensorboard_writer.close()


def truncate(path: Path, size: int) -> None:
    """Shorten a file to `size` bytes if it is longer; do nothing if it does not exist."""
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)


def plot_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot training and validation loss in bits per byte against tokens, and the learning rate below, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [r for r in records if "bits_per_byte" in r]
    val = [r for r in records if "val_bits_per_byte" in r]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, lr_axis = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    tokens, bits = [r["tokens"] for r in train], [r["bits_per_byte"] for r in train]
    val_tokens, val_bits = [r["tokens"] for r in val], [r["val_bits_per_byte"] for r in val]
    loss_axis.plot(tokens, bits, lw=0.8, color="#9ecae1", label="training")
    loss_axis.plot(val_tokens, val_bits, "o-", ms=3, color="#08519c", label="validation")
    if val:
        end, above = (val_tokens[-1], val_bits[-1]), (0, 6)
        loss_axis.annotate(f"{val_bits[-1]:.3f}", end, above, textcoords="offset points", ha="right")
        loss_axis.set_ylim(0.9 * min([*val_bits, *bits]), 2.5 * min(val_bits))
    loss_axis.set(ylabel="bits per byte", title=title)
    loss_axis.grid(alpha=0.3)
    loss_axis.legend()
    lr_axis.plot(tokens, [r["learning_rate"] for r in train], lw=1, color="#636363")
    lr_axis.set(xlabel="training tokens", ylabel="learning rate")
    lr_axis.grid(alpha=0.3)
    with atomic_file(path, sync=False) as file:
        figure.savefig(file, format="png")
