"""Folders that cannot be written and a home that does not exist: commands work or say so in one line."""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from campaign import base as valid_files
from campaign.full_disk import TRAIN, split
from campaign.outputs import digest
from campaign.program import command, environment, judge, shell_code
from campaign.record import Record


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a user may write: variables of the environment, and folders below `home` that are made read-only."""

    name: str
    variables: dict[str, str | None]
    read_only: bool = True


def homes(folder: Path) -> Iterator[Home]:
    """Yield homes; `folder/home` is read-only, `folder/missing` does not exist."""
    home, missing = str(folder / "home"), str(folder / "missing")
    plain: dict[str, str | None] = {"TINYSTORIES_CACHE": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
    yield Home("read-only home", plain | {"HOME": home})
    yield Home("no HOME", plain | {"HOME": None})
    yield Home("HOME does not exist", plain | {"HOME": missing})
    yield Home("HOME is a file", plain | {"HOME": str(folder / "file")})
    yield Home("read-only cache", plain | {"HOME": home, "TINYSTORIES_CACHE": home})
    yield Home("cache is a file", plain | {"HOME": home, "TINYSTORIES_CACHE": str(folder / "file")})
    yield Home("relative cache", plain | {"HOME": home, "TINYSTORIES_CACHE": "x/y", "XDG_CACHE_HOME": ""})


# Commands, and whether each must succeed: True, or False if it must be refused, as it has to write where it cannot.
COMMANDS: dict[str, tuple[str, bool | None]] = {
    "generate": ("generate --max-tokens 3 --threads 1", True),
    "generate-model": ("generate model --max-tokens 3 --threads 1", True),
    "info": ("info model", True),
    "eval": ("eval model --data BASE/data --limit 1 --engine cpu", True),
    "warmup": ("warmup", None),
    "quantize": ("quantize model", False),
    "quantize-out": ("quantize model --out model/new", False),
    "export": ("export model --format hf --out model/hf", False),
    "import": ("import BASE/hf-llama --out model/new", False),
    "prepare": ("prepare sample --tokenizer bpe:300 --out model/data", False),
    "train": (f"{TRAIN} --train.steps 2 --out model/run", False),
    "train-elsewhere": (f"{TRAIN} --train.steps 2 --out WRITABLE/run", True),
    "resume": ("train --out run --resume", False),
    "generate-out": ("generate model --max-tokens 3 --out model/story.txt", False),
    "sweep": (f"sweep {TRAIN.removeprefix('train ')} --out model/sweep --trials 1 --optim.weight_decay 0.1,0.2", False),
}


def readonly(record: Record, work: Path, names: list[str], *, plant: str | None) -> None:
    """Run commands without privileges in a folder that cannot be written, with several homes."""
    base = valid_files.build(work)
    folder = work / "readonly"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    (folder / "file").write_text("a file\n")
    for name in ("model", "run"):
        shutil.copytree(base / name, folder / name)
    writable = folder / "writable"
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o755)
    writable.mkdir()
    writable.chmod(0o777)
    folder.chmod(0o555)
    before = digest(folder / "model"), digest(folder / "run")
    for home in homes(folder):
        for name in names or sorted(COMMANDS):
            words, must_succeed = COMMANDS[name]
            shutil.rmtree(writable / "run", ignore_errors=True)
            code, stderr = run_unprivileged(
                work, folder, split(words.replace("WRITABLE", str(writable)), base), home, plant
            )
            record.counts["commands"] += 1
            record.counts[f"code {code}"] += 1
            problem = judge(code, stderr)
            if problem is None and must_succeed is not None and must_succeed != (code == 0):
                problem = f"exit code {code}, which should {'' if must_succeed else 'not '}be 0"
            if problem is None and before != (digest(folder / "model"), digest(folder / "run")):
                problem = "files changed"
            if problem:
                finding = record.add_finding(f"{name}-{home.name.replace(' ', '-')}", problem, words=words)
                (finding / "output").write_text(stderr)
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    shutil.rmtree(folder)


# Root without capabilities is bound by the modes of files like anybody else, and can still read its own Python.
DROP_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def run_unprivileged(work: Path, folder: Path, words: list[str], home: Home, plant: str | None) -> tuple[int, str]:
    """Run a command in `folder`, which its user owns but may not write."""
    done = subprocess.run(
        [*(DROP_CAPABILITIES if os.geteuid() == 0 else ()), *command(*words, plant=plant)],
        cwd=folder,
        env=environment(work, **home.variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    return shell_code(done.returncode), done.stderr.decode(errors="replace")
