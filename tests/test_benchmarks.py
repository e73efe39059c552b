"""The scripts in benchmarks/ report bad input as one line on stderr with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("storyteller.py nowhere --train t.txt --val v.txt", "no such model directory"),
        ("frontier.py --data nowhere --out runs", "nowhere"),
        ("train.py --nanogpt nowhere", "nowhere is not a Python file"),
        ("ablation.py --data nowhere --out runs", "nowhere"),  # reported by a child process
    ],
)
def test_bad_input_is_one_line(words: str, message: str, tmp_path: Path) -> None:
    script, *options = words.split()
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
