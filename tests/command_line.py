"""Run the command line and the scripts in processes of their own, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = "from tinystories.cli import main; main()"


def run_python(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python and return its exit code and what it printed."""
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


def tinystories(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `tinystories` with these words."""
    return run_python("-c", PROGRAM, *words, cwd=cwd, **environment)


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error line of a command that failed by the user's mistake."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]
