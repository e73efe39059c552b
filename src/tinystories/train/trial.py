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

LOG = "train.log"
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was asked to stop


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


def folder_of(sweep: Path, number: int) -> Path:
    return sweep / f"trial-{number:04d}"


def write_whole(path: Path, text: str) -> None:
    """A text file that is whole or absent, whatever comes between."""
    draft = path.with_name("." + path.name)
    with draft.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def command(folder: Path) -> list[str]:
    """Starts a trial, and goes on with it: its settings lie in its folder."""
    return [sys.executable, "-m", "tinystories", "train", "--out", str(folder.resolve()), "--resume"]


def environment(slot: int, workers: int, device: str) -> Mapping[str, str]:
    """What the process of the `slot`-th worker runs in: its share of the cores, and of the GPUs a GPU of its own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    added = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
    if workers > 1 and device in ("auto", "cuda"):
        import torch

        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        if len(gpus) > 1:
            added["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return os.environ | added


def place(folder: Path, config: Config) -> None:
    """Make the run directory of a trial. Where a kill came in between, it is made once more."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.toml").exists():
        write_whole(folder / "config.toml", to_toml(config))


class Process:
    """A trial under way, in a session of its own: a Ctrl-C reaches the sweep alone, which then asks it to stop."""

    def __init__(self, folder: Path, slot: int, workers: int, device: str) -> None:
        self.folder, self.slot = folder, slot
        self.pruned = ""  # why it was stopped for good
        with (folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(slot, workers, device),
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Let it finish its step and save."""
        if not self.ended():
            self.process.terminate()

    def kill(self) -> None:
        if not self.ended():
            self.process.kill()

    def outcome(self) -> Outcome | None:
        """What came of it, once it has ended; None where it was interrupted and can go on."""
        assert self.process.returncode is not None, "the trial is still running"
        code = self.process.returncode
        found = measured(self.folder)
        if found.state != "unfinished":
            return found
        if self.pruned:
            return dataclasses.replace(found, state="pruned", reason=self.pruned)
        if code in STOPPED:
            return None
        reason = last_error(self.folder, code)
        return dataclasses.replace(found, state="failed", reason=reason, settings_to_blame=code == 2)

    def began(self) -> bool:
        """Whether it came as far as its first step; what stops a run before that may stop all of them."""
        return (self.folder / "metrics.jsonl").exists()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, of a run that may be writing it."""
    try:
        text = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def measured(folder: Path) -> Outcome:
    """What metrics.jsonl tells: complete with a final evaluation, unfinished without."""
    records = read_records(folder)
    if not records:
        return Outcome("unfinished")
    bits = [record["val_bits_per_byte"] for record in records if "val_bits_per_byte" in record]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    last = records[-1]
    found = Outcome(
        state="complete" if last.get("final") else "unfinished",
        bits_per_byte=bits[-1] if bits else None,
        step=last["step"],
        tokens=last["tokens"],
        seconds=seconds[-1] if seconds else 0.0,
    )
    if found.state == "complete" and not math.isfinite(bits[-1]):
        reason = "its bits per byte are not finite"
        return dataclasses.replace(found, state="failed", bits_per_byte=None, reason=reason, settings_to_blame=True)
    return found


def last_error(folder: Path, code: int) -> str:
    """The one line a run failed with, or else how it ended and where its log lies."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code == 2 and told:
        return told[-1]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}; see {folder / LOG}"


def stop_left_over(folders: Iterable[Path]) -> int:
    """Stop the processes that a killed sweep has left behind on this machine, and wait until they have saved.

    They are known by their command, which names the folder. Returns how many there were.
    """
    import psutil

    wanted = {tuple(command(folder)[1:]) for folder in folders}
    found = [
        process for process in psutil.process_iter(["cmdline"]) if tuple((process.info["cmdline"] or [])[1:]) in wanted
    ]
    for process in found:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            raise UserError(f"process {process.pid} of an earlier sweep is still training here; end it first") from None
    while any(is_alive(process) for process in found):
        time.sleep(0.1)
    return len(found)


def is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
