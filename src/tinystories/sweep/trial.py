"""One trial of a sweep: its run directory, the process that trains in it, and its outcome."""

import dataclasses
import json
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
from tinystories.files import write_atomic

LOG_FILE = "train.log"
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


def prepare_dir(folder: Path, config: Config) -> None:
    """Create the run directory of a trial with its config.toml, if a killed sweep has not done so already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.toml").exists():
        write_atomic(folder / "config.toml", to_toml(config))


class TrialProcess:
    """The process of a running trial.

    It has its own process session, so Ctrl-C reaches only the sweep, which then asks the trial to stop.
    """

    def __init__(self, folder: Path, slot: int, workers: int, device: str) -> None:
        self.folder, self.slot = folder, slot
        self.prune_reason = ""  # set when the pruner has stopped it
        with (folder / LOG_FILE).open("ab") as log:
            self.popen = subprocess.Popen(
                train_command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=worker_environment(slot, workers, device),
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def stop(self) -> None:
        """Ask the trial to finish its step, save and exit."""
        if not self.has_ended():
            self.popen.terminate()

    def kill(self) -> None:
        if not self.has_ended():
            self.popen.kill()

    def final_outcome(self) -> Outcome | None:
        """Return the outcome of an ended process; None if the trial was interrupted and can be resumed."""
        assert self.popen.returncode is not None, "the trial is still running"
        exit_code = self.popen.returncode
        outcome = read_outcome(self.folder)
        if outcome.state != "unfinished":
            return outcome
        if self.prune_reason:
            return dataclasses.replace(outcome, state="pruned", reason=self.prune_reason)
        if exit_code in STOP_EXIT_CODES:
            return None
        reason = failure_reason(self.folder, exit_code)
        return dataclasses.replace(outcome, state="failed", reason=reason, settings_to_blame=exit_code == 2)

    def has_started(self) -> bool:
        """Return whether the first step was recorded. What stops a run before that may stop every trial."""
        return (self.folder / "metrics.jsonl").exists()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; an incomplete last line of a running trial is ignored."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read_outcome(folder: Path) -> Outcome:
    """Return the outcome recorded in metrics.jsonl: complete after a final evaluation, else unfinished.

    A trial whose final bits per byte are not finite has failed.
    """
    records = read_records(folder)
    if not records:
        return Outcome("unfinished")
    bits = [record["val_bits_per_byte"] for record in records if "val_bits_per_byte" in record]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    last = records[-1]
    outcome = Outcome(
        state="complete" if last.get("final") else "unfinished",
        bits_per_byte=bits[-1] if bits else None,
        step=last["step"],
        tokens=last["tokens"],
        seconds=seconds[-1] if seconds else 0.0,
    )
    if outcome.state == "complete" and not math.isfinite(bits[-1]):
        reason = "its bits per byte are not finite"
        return dataclasses.replace(outcome, state="failed", bits_per_byte=None, reason=reason, settings_to_blame=True)
    return outcome


def failure_reason(folder: Path, exit_code: int) -> str:
    """Return the error line that a run printed, or its exit code and the path of its log."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    error_lines = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if exit_code == 2 and error_lines:
        return error_lines[-1]
    exit_text = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    return f"{exit_text}; see {folder / LOG_FILE}"


def stop_orphans(folders: Iterable[Path]) -> int:
    """Stop the trials that a killed sweep left running on this machine, and wait until they have saved.

    They are recognized by their command line, which contains the folder. Returns how many there were. `UserError` if
    one of them belongs to another user.
    """
    import psutil

    orphan_commands = {tuple(train_command(folder)[1:]) for folder in folders}
    processes = [
        process
        for process in psutil.process_iter(["cmdline"])
        if tuple((process.info["cmdline"] or [])[1:]) in orphan_commands
    ]
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            raise UserError(
                f"process {process.pid} of an earlier sweep is still running and may not be stopped; end it first"
            ) from None
    while any(is_alive(process) for process in processes):
        time.sleep(0.1)
    return len(processes)


def is_alive(process: Any) -> bool:
    """Return whether a psutil process is running; a zombie is not."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
