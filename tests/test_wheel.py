"""The wheel: in an empty environment, without Numba, the first story needs nothing compiled. Needs a package index."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

from tinystories.engine.cpu import objects
from tinystories.engine.cpu.target import select_target


@pytest.mark.interop
def test_the_first_story_from_a_wheel_compiles_nothing(tmp_path: Path) -> None:
    if objects.find_object(select_target()) is None:
        pytest.skip("no objects of these sources for this processor; `make objects`")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TINYSTORIES_CACHE"] = str(tmp_path / "cache")
    bin_folder = tmp_path / "venv" / "bin"
    pip = [str(bin_folder / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]

    def run(*command: str) -> str:
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    run(*pip, "install", "--constraint", str(ROOT / "constraints.txt"), *map(str, tmp_path.glob("*.whl")))
    run(*pip, "uninstall", "--yes", "numba")
    output = run(str(bin_folder / "tinystories"), "generate", "--seed", "16", "--max-tokens", "9")
    assert "Once upon a time" in output
    assert "compiling" not in output
    assert not (tmp_path / "cache").exists()
