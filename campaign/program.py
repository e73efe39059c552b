"""The program under attack: its command line, its environment, and what it may answer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tinystories

ROOT = Path(__file__).parents[1]
ACCEPTED_CODES = {0, 2, 130, 143}  # success, user error, stopped by SIGINT, stopped by SIGTERM
TRACEBACK = "Traceback (most recent call last)"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
# A training run of a few seconds on one CPU thread; checkpoints are frequent.
TINY_MODEL = (
    "--model.n_layer 1 --model.n_embd 32 --model.n_ff 64 --model.n_head 2 --model.n_ctx 64 --model.dropout 0.1"
    " --train.device cpu --train.precision fp32 --train.compile off --train.batch_size 4 --train.micro_batch 4"
    " --train.sample_tokens 4 --train.log_every 1"
).split()


def command(*arguments: object, plant: str | None = None) -> list[str]:
    """Return the words that start the command line, with a planted fault if one is named."""
    module = ["tinystories"] if plant is None else ["campaign.plants", plant]
    return [sys.executable, "-m", *module, *map(str, arguments)]


def environment(work: Path, **changes: str | None) -> dict[str, str]:
    """Return the environment of a command: offline, one thread, a cache below `work`; None removes a variable."""
    package_folder = Path(tinystories.__file__).parents[1]
    variables: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": f"{package_folder}{os.pathsep}{ROOT}",
        "TINYSTORIES_CACHE": str(work / "cache"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        **changes,
    }
    return {name: value for name, value in variables.items() if value is not None}


def run(work: Path, *arguments: object, timeout: float = 300.0, plant: str | None = None) -> tuple[int, str]:
    """Run a command to its end in `work`; return its exit code as a shell reports it, and its stderr."""
    done = subprocess.run(
        command(*arguments, plant=plant),
        cwd=work,
        env=environment(work),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=timeout,
        check=False,
    )
    return shell_code(done.returncode), done.stderr.decode(errors="replace")


def run_or_fail(work: Path, *arguments: object) -> None:
    """Run a command that must succeed, because the campaign needs its output."""
    code, stderr = run(work, *arguments)
    if code:
        raise SystemExit(f"campaign: `tinystories {' '.join(map(str, arguments))}` failed with {code}:\n{stderr}")


def shell_code(code: int) -> int:
    """Return an exit code as a shell reports it: 128 + n after death by signal n."""
    return code if code >= 0 else 128 - code


def judge(code: int, stderr: str) -> str | None:
    """Return what is wrong with the end of a command, or None if it is acceptable."""
    if TRACEBACK in stderr:
        lines = stderr.rpartition(TRACEBACK)[2].splitlines()[1:]
        return f"traceback: {next((line for line in lines if not line.startswith(' ')), '')[:200]}"
    if code not in ACCEPTED_CODES:
        return f"exit code {code}"
    if "error: not enough memory" in stderr:  # a file must not take more than it is worth
        return "memory exhausted"
    if CONTROL_CHARACTERS.search(stderr):
        return "control characters in a message"
    if code == 2:
        lines = stderr.splitlines()
        first_error = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
        if first_error is None:
            return "exit code 2 without an error line"
        if first_error != len(lines) - 1:
            return "an error of several lines"
    return None
