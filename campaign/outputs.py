"""What must hold of the files that a command leaves behind, however it ended."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

Snapshot = dict[str, str]


def digest(path: Path) -> str:
    """Return a digest of a file, or of a folder with the names of its files; empty if there is none."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return ""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(path)} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_model(folder: Path) -> str | None:
    """Return what is wrong with a model directory, by its own checksums; None if nothing."""
    try:
        files = json.loads((folder / "config.json").read_text())["files"]
        for name, expected in files.items():
            if digest(folder / name) != expected:
                return f"{folder / name} does not match its checksum"
        clock = folder / "state" / "clock.json"
        if (folder / "state").exists():
            expected = json.loads(clock.read_text())["optimizer_sha256"]
            if digest(folder / "state" / "optimizer.safetensors") != expected:
                return f"{folder}: the optimizer state does not match its checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"{folder} is damaged: {error!r}"
    return None


def check_run(run: Path, before: set[str]) -> str | None:
    """Return what is wrong with a run: a checkpoint that is not whole, or none left of those there were before."""
    checkpoints = [path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".draft"]
    for folder in checkpoints:
        if problem := check_model(folder):
            return problem
    if before and not checkpoints:
        return f"{run} had checkpoints {sorted(before)} and has none now"
    return None


def list_checkpoints(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("step-*") if path.suffix != ".draft"}


Check = Callable[[Path], str | None]
