"""Large files of weights are read into large pages of the process's own, and others are mapped."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from tinystories.weights import safetensors_file
from tinystories.weights.safetensors_file import SafetensorsFile, fits_large_pages, write_safetensors

TENSORS = {"a": np.arange(700, dtype=np.float32).reshape(70, 10), "b": np.arange(5, dtype=np.int8)}
NEEDS_ADVICE = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux only")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large."""
    monkeypatch.setattr(safetensors_file, "MIN_LARGE_PAGES_BYTES", 100)
    monkeypatch.setattr(safetensors_file, "fits_large_pages", lambda _: True)
    write_safetensors(tmp_path / "weights", TENSORS, {})
    return tmp_path / "weights"


def overwrite(path: Path) -> None:
    """Change all bytes, in the same file."""
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


@NEEDS_ADVICE
@pytest.mark.parametrize("is_large", [True, False])
def test_a_large_file_is_read_and_a_small_one_is_mapped(
    path: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_large:
        monkeypatch.setattr(safetensors_file, "MIN_LARGE_PAGES_BYTES", 10**6)
    file = SafetensorsFile(path)
    assert file.digest() == file.metadata["sha256"]
    for name, expected in TENSORS.items():
        assert (file[name] == expected).all()
        assert not file[name].flags.writeable
    overwrite(path)
    assert (file["a"] == TENSORS["a"]).all() == is_large


@NEEDS_ADVICE
def test_a_file_that_becomes_shorter_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncate(n_bytes: int) -> bool:
        with path.open("r+b") as file:
            file.truncate(n_bytes - 1)
        return True

    monkeypatch.setattr(safetensors_file, "fits_large_pages", truncate)
    with pytest.raises(ValueError, match="it became shorter while it was read"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n"}, True),
        ({"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"}, False),
        ({"sys/kernel/mm/transparent_hugepage/enabled": None}, False),
        ({"proc/meminfo": None}, False),
        ({"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    399 kB\n"}, False),
        ({"sys/fs/cgroup/memory.max": "max\n"}, True),
        ({"sys/fs/cgroup/memory.max": f"{400 * 1024 - 1}\n"}, False),
        ({"sys/fs/cgroup/memory.max": f"{400 * 1024}\n"}, True),
    ],
    ids=str,
)
def test_large_pages_need_a_system_that_has_them_and_memory(
    files: dict[str, str | None], expected: bool, tmp_path: Path
) -> None:
    usual: dict[str, str | None] = {
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    400 kB\n",
    }
    for name, text in (usual | files).items():
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    assert fits_large_pages(100 * 1024, tmp_path) == expected
