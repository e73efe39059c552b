"""The runs in a folder, as the lab shows them: which there are, how far they are, their samples and checkpoints.

What is in the folder may be damaged, half-written, or about to vanish; nothing outside of it is read.
"""

import dataclasses
import itertools
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.errors import UserError
from tinystories.serve.errors import ApiError
from tinystories.serve.lab.run_metrics import RunProblemError, parse_record, read_part

METRICS, SAMPLES = "metrics.jsonl", "samples.md"
MAX_LISTED = 100
MAX_ENTRIES = 50_000  # of the folder; further ones are not looked at
MAX_CHECKPOINTS = 500  # listed; the newest
TAIL_BYTES = 1 << 16  # of metrics.jsonl, to know how far a run is
MAX_SAMPLES_BYTES = 4 << 20  # the end of a longer samples.md
MAX_SECTIONS, MAX_SECTION_CHARS = 200, 20_000
MAX_SETTINGS_BYTES = 1 << 16
SECTION = re.compile(r"^## Step ([0-9,]{1,20})(?: \((.*)\))?[ \t]*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory directly inside `root`. `RunProblemError` says why something of it cannot be shown."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def file(self, name: str) -> Path:
        """Return the path of a file of the run, which is a regular file inside the root."""
        path = self.folder / name
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError):
            raise RunProblemError(f"the run has no {name}, or it was removed") from None
        if not is_file or not is_inside(self.root, path):
            raise RunProblemError(f"{name} is not a file inside the folder of runs, so that it is not read")
        return path

    def metrics_path(self) -> Path:
        """Return the path of metrics.jsonl."""
        return self.file(METRICS)

    def settings(self) -> dict[str, Any]:
        """Return [train] of the run's config.toml; nothing if it cannot be read."""
        try:
            text = read_part(self.file("config.toml"), MAX_SETTINGS_BYTES).decode()
            settings = tomllib.loads(text).get("train")
        except (RunProblemError, ValueError, RecursionError, OSError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def setting(self, name: str) -> int | None:
        """Return a setting of [train] that is a whole number."""
        value = self.settings().get(name)
        return value if type(value) is int and 0 < value < 2**53 else None

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, directory) of the complete checkpoints inside the root, oldest first."""
        try:
            listed = checkpoint.list_checkpoints(self.folder)[-MAX_CHECKPOINTS:]
        except (OSError, UserError, ValueError):
            return []
        return [(step, folder) for step, folder in listed if is_inside(self.root, folder / "config.json")]

    def checkpoint(self, step: int | None) -> Path:
        """Return the directory of a checkpoint; without a step, the newest, or the run itself if it is a model."""
        folders = dict(self.checkpoints())
        if step is None and is_inside(self.root, self.folder / "config.json"):
            return self.folder
        wanted = max(folders, default=None) if step is None else step
        if wanted is None or wanted not in folders:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step:,}"
            raise RunProblemError(f"this run has {which}; only the newest ones and the best one are kept")
        return folders[wanted]

    def summarize(self, now: float) -> dict[str, Any]:
        """Return name, steps, tokens, the latest loss and score, and the seconds since the last line."""
        path = self.metrics_path()
        status = path.stat()
        lines = read_part(path, TAIL_BYTES, start=max(0, status.st_size - TAIL_BYTES)).split(b"\n")
        records = [record for record in map(parse_record, lines) if record is not None]
        latest: dict[str, Any] = {}
        for record in records:
            latest |= {name: value for name, value in record.items() if value is not None}
        names = ("step", "tokens", "seconds", "loss", "bits_per_byte", "val_bits_per_byte")
        return {
            "name": self.name,
            **{name: latest.get(name) for name in names},
            "steps": self.setting("steps"),
            "age_s": round(max(0.0, now - status.st_mtime), 1),
        }

    def describe(self) -> dict[str, Any]:
        """Return the samples and checkpoints, and what about them cannot be shown."""
        problems = []
        try:
            sections, is_cut = parse_samples(self.file(SAMPLES))
            if is_cut:
                problems.append("samples.md is very long; only its last part is shown")
        except (RunProblemError, OSError) as error:
            sections = []
            problems.append(str(error) if isinstance(error, RunProblemError) else "samples.md cannot be read")
        return {
            "name": self.name,
            "samples": sections,
            "checkpoints": [step for step, _ in self.checkpoints()],
            "keep_checkpoints": self.setting("keep_checkpoints"),
            "checkpoint_every": self.setting("checkpoint_every"),
            "problems": problems,
        }

    def fingerprint(self) -> tuple[object, ...]:
        """Return what changes when samples or checkpoints are written."""
        return tuple(stamp(self.folder / name) for name in (SAMPLES, "checkpoints"))


def stamp(path: Path) -> tuple[int, int] | None:
    """Return size and modification time of a path; None if there is nothing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path exists and, after all symbolic links, is below `root`."""
    try:
        return path.resolve(strict=True).is_relative_to(root.resolve(strict=True))
    except (OSError, RuntimeError, ValueError):
        return False


def find_run(root: Path | None, name: str) -> Run:
    """Return a run by its name. `ApiError` (404) if the folder has no such run, or the name could lead out of it."""
    if root is not None and is_run_name(name):
        run = Run(root, name)
        if is_inside(root, run.folder) and (run.folder / METRICS).exists():
            return run
    raise ApiError(404, "there is no such run; it may have been removed or renamed", code="run_not_found")


def is_run_name(name: str) -> bool:
    """Whether a name is that of one folder, not hidden, and can be written as text."""
    return 0 < len(name) <= 255 and name[0] != "." and not re.search(r"[/\\\0\ud800-\udfff]", name)


def list_runs(root: Path | None, contains: str = "") -> dict[str, Any]:
    """Return the runs of a folder whose names contain a text, those that were written last first."""
    if root is None:
        return {"has_folder": False, "runs": [], "n_runs": 0, "problems": []}
    problems: list[str] = []
    try:
        entries = list(iter_runs(root, contains.lower(), problems))
    except OSError:
        entries = []
        problems.append("the folder of runs cannot be read; it may have been removed")
    entries.sort(key=lambda entry: (-entry[0], entry[1]))
    now, runs = time.time(), []
    for _, name in entries[:MAX_LISTED]:
        try:
            runs.append(Run(root, name).summarize(now))
        except (RunProblemError, OSError):
            continue  # it vanished in between
    return {"has_folder": True, "runs": runs, "n_runs": len(entries), "problems": problems}


def iter_runs(root: Path, contains: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (modification time of metrics.jsonl, name) of each run; add what is left out to `problems`."""
    n_outside = n_unnamed = 0
    with os.scandir(root) as entries:
        for entry in itertools.islice(entries, MAX_ENTRIES):
            path = Path(entry.path, METRICS)
            try:
                status = path.stat()
            except (OSError, ValueError):
                continue
            if not stat.S_ISREG(status.st_mode) or entry.name.startswith("."):
                continue
            if not is_run_name(entry.name):
                n_unnamed += 1
            elif (entry.is_symlink() or path.is_symlink()) and not is_inside(root, path):
                n_outside += 1
            elif contains in entry.name.lower():
                yield status.st_mtime_ns, entry.name
    if n_outside:
        problems.append(f"{n_outside} links lead out of the folder of runs, so that they are not followed")
    if n_unnamed:
        problems.append(f"{n_unnamed} runs have names that are not valid text; rename them to see them here")


def parse_samples(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the sections of a samples.md: step, score and stories; and whether there were more."""
    size = path.stat().st_size
    text = read_part(path, MAX_SAMPLES_BYTES, start=max(0, size - MAX_SAMPLES_BYTES)).decode("utf-8", "replace")
    headers = list(SECTION.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    sections = [
        {
            "step": int(header[1].replace(",", "") or 0),
            "score": header[2] or "",
            "stories": split_quotes(text[header.end() : end][:MAX_SECTION_CHARS]),
        }
        for header, end in zip(headers, ends, strict=True)
    ]
    return sections[-MAX_SECTIONS:], size > MAX_SAMPLES_BYTES or len(sections) > MAX_SECTIONS


def split_quotes(text: str) -> list[str]:
    """Return the stories of a section: blocks of lines that begin with ">"."""
    stories: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(">"):
            stories[-1].append(line[1:].removeprefix(" "))
        elif stories[-1]:
            stories.append([])
    return ["\n".join(lines) for lines in stories if lines]
