"""One trial of a sweep: a run directory, the process that trains in it, and what came of it."""

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

from tinystories.config import Config, to_toml
from tinystories.errors import UserError

LOG_FILE = "train.log"
STOP_EXIT_CODES = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was asked to stop


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a trial. `state`: complete, pruned, failed, unfinished, or invalid: not to be trained with."""

    state: str
    bits_per_byte: float | None = None  # of the last evaluation; the whole validation set's if complete
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training steps, over all sittings
    reason: str = ""  # why it is not complete
    settings_to_blame: bool = False  # other trials had better keep away from these settings


def trial_dir(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / f"trial-{number:04d}"


def write_atomic(path: Path, text: str) -> None:
    """A text file that is whole or absent, whatever comes between."""
    temp_path = path.with_name("." + path.name)
    with temp_path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp_path, path)


def train_command(folder: Path) -> list[str]:
    """Starts a trial, and goes on with it: its settings lie in its folder."""
    return [sys.executable, "-m", "tinystories", "train", "--out", str(folder.resolve()), "--resume"]


def worker_environment(slot: int, workers: int, device: str) -> Mapping[str, str]:
    """What the process of the `slot`-th worker runs in: its share of the cores, and of the GPUs a GPU of its own."""
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
    """Make the run directory of a trial. Where a kill came in between, it is made once more."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.toml").exists():
        write_atomic(folder / "config.toml", to_toml(config))


class TrialProcess:
    """A trial under way, in a session of its own: a Ctrl-C reaches the sweep alone, which then asks it to stop."""

    def __init__(self, folder: Path, slot: int, workers: int, device: str) -> None:
        self.folder, self.slot = folder, slot
        self.prune_reason = ""  # why it was stopped for good
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
        """Let it finish its step and save."""
        if not self.has_ended():
            self.popen.terminate()

    def kill(self) -> None:
        if not self.has_ended():
            self.popen.kill()

    def final_outcome(self) -> Outcome | None:
        """What came of it, once it has ended; None where it was interrupted and can go on."""
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
        """Whether it came as far as its first step; what stops a run before that may stop all of them."""
        return (self.folder / "metrics.jsonl").exists()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, of a run that may be writing it."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read_outcome(folder: Path) -> Outcome:
    """What metrics.jsonl tells: complete with a final evaluation, unfinished without."""
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
    """The one line a run failed with, or else how it ended and where its log lies."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    error_lines = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if exit_code == 2 and error_lines:
        return error_lines[-1]
    exit_text = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"
    return f"{exit_text}; see {folder / LOG_FILE}"


def stop_orphans(folders: Iterable[Path]) -> int:
    """Stop the processes that a killed sweep has left behind on this machine, and wait until they have saved.

    They are known by their command, which names the folder. Returns how many there were.
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
            raise UserError(f"process {process.pid} of an earlier sweep is still training here; end it first") from None
    while any(is_alive(process) for process in processes):
        time.sleep(0.1)
    return len(processes)


def is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
