"""One trial of a sweep: its run directory, the process that trains in it, and its outcome."""

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinystories.config import Config
from tinystories.config_file import to_toml
from tinystories.errors import UserError
from tinystories.files import DISK_FULL_ERRNOS, error_reason, write_atomic, write_errors
from tinystories.train.recording.metrics import parse_records

LOG_FILE = "train.log"
# What a run says of a disk that is full or fails, or if it has no more file descriptors.
DISK_REASONS = tuple(
    os.strerror(number)
    for number in (*DISK_FULL_ERRNOS, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENFILE)
)
STOP_EXIT_CODES = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # of a run that was asked to stop and has saved


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    `state`: complete, pruned, failed, unfinished, or invalid (the settings contradict each other; it was not trained).
    """

    state: str
    bits_per_byte: float | None = None  # last evaluation; on the whole validation set if complete
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in training steps, over all sessions
    reason: str = ""  # why it is not complete
    settings_to_blame: bool = False  # the sampler should avoid these settings
    lost_text: float = 0.0  # share of the text that the tokenizer cannot give back; unless 0, the score is too good


def trial_dir(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / f"trial-{number:04d}"


def train_command(folder: Path) -> list[str]:
    """Return the command that starts or resumes a trial; its settings are in `folder`/config.toml."""
    return [sys.executable, "-m", "tinystories", "train", "--out", str(folder.resolve()), "--resume"]


def worker_environment(slot: int, workers: int, device: str) -> Mapping[str, str]:
    """Return the environment of worker `slot`: its share of the CPU cores and, if there are several GPUs, its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    overrides = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
    if workers > 1 and device in ("auto", "cuda"):
        import torch

        visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible_devices.split(",") if visible_devices else [str(i) for i in range(torch.cuda.device_count())]
        if len(gpus) > 1:
            overrides["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return os.environ | overrides


def start_process(folder: Path, config: Config, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start or resume the process that trains a trial; a new run directory gets the trial's config.toml.

    It has its own process session, so Ctrl-C reaches only the sweep, which then asks the trial to stop.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.toml").exists():
            write_atomic(folder / "config.toml", to_toml(config))
        log = (folder / LOG_FILE).open("ab")
    with log:
        try:
            return subprocess.Popen(
                train_command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:  # no memory, or too many processes
            raise UserError(f"{folder.name} cannot be started: {error_reason(error)}") from None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; an incomplete last line of a running trial is ignored."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return parse_records(text[: text.rfind(b"\n") + 1], folder / "metrics.jsonl")


def read_outcome(folder: Path) -> Outcome:
    """Return the outcome recorded in metrics.jsonl: complete after a final evaluation, else unfinished.

    A trial whose final bits per byte are not finite has failed.
    """
    records = read_records(folder)
    if not records:
        return Outcome("unfinished")
    latest = {key: value for record in records for key, value in record.items()}  # the last value of each field
    bits = latest.get("val_bits_per_byte")
    outcome = Outcome("unfinished", bits, latest["step"], latest["tokens"], latest.get("seconds", 0.0))
    outcome = dataclasses.replace(outcome, lost_text=latest.get("val_lost_text", 0.0))
    if not records[-1].get("final"):
        return outcome
    if math.isfinite(records[-1]["val_bits_per_byte"]):
        return dataclasses.replace(outcome, state="complete")
    reason = "its bits per byte are not finite"
    return dataclasses.replace(outcome, state="failed", bits_per_byte=None, reason=reason, settings_to_blame=True)


def log_size(folder: Path) -> int:
    """Return the size of a trial's log, which later sessions append to; 0 if there is none."""
    path = folder / LOG_FILE
    return path.stat().st_size if path.exists() else 0


def final_outcome(
    folder: Path, exit_code: int, prune_reason: str, *, log_start: int = 0, asked_to_stop: bool = True
) -> Outcome:
    """Return the outcome of a trial whose process has ended; unfinished if it was interrupted and can be resumed.

    `log_start` is the size that its log had before. The reason of an unfinished trial is what stopped it from outside,
    empty if the sweep did (`asked_to_stop`).
    """
    outcome = read_outcome(folder)
    if outcome.state != "unfinished":
        return outcome
    if prune_reason:
        return dataclasses.replace(outcome, state="pruned", reason=prune_reason)
    if exit_code in STOP_EXIT_CODES and asked_to_stop:
        return outcome
    log = (folder / LOG_FILE).read_bytes()[log_start:].decode(errors="replace")
    if cause := outside_cause(exit_code, log):
        return dataclasses.replace(outcome, reason=cause)
    reason = failure_reason(folder, exit_code, log)
    return dataclasses.replace(outcome, state="failed", reason=reason, settings_to_blame=exit_code == 2)


def outside_cause(exit_code: int, log: str) -> str:
    """Return what stopped a trial if its settings did not: a signal, or a disk that is full or fails; "" if neither."""
    if exit_code in STOP_EXIT_CODES or exit_code < 0:
        return f"killed by {signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name}"
    *lines, _ = log.split("\n")  # without an incomplete last line
    last_line = next((line for line in reversed(lines) if line.strip()), "").removeprefix("error: ")
    if any(reason in last_line for reason in DISK_REASONS):
        return last_line
    # A run that ends with this code has written a line, unless the disk had no space for it.
    if exit_code == 2 and not any(line.startswith("error: ") for line in lines):
        return f"its error message could not be written to {LOG_FILE}"
    return ""


def failure_reason(folder: Path, exit_code: int, log: str) -> str:
    """Return the error line that a run printed, or its exit code and the path of its log."""
    error_lines = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    return error_lines[-1] if exit_code == 2 else f"exit code {exit_code}; see {folder / LOG_FILE}"


def stop_orphans(folders: Iterable[Path]) -> int:
    """Stop the trials that a killed sweep left running on this machine, and wait until they have saved.

    They are recognized by their command line, which contains the folder. Returns how many there were. `UserError` if
    one of them belongs to another user.
    """
    import psutil

    commands = [train_command(folder)[1:] for folder in folders]
    orphans = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] in commands]
    for process in orphans:
        try:
            process.terminate()
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            raise UserError(
                f"process {process.pid} of an earlier sweep is still running and may not be stopped; end it first"
            ) from None
    return len(orphans)
