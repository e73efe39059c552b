"""Stub."""

from pathlib import Path
from typing import Any

import numpy.typing as npt

from tinystories.interop.portable import Portable


def write(model: Portable, path: Path, precision: str) -> None:
    raise NotImplementedError


def logits(path: Path, ids: list[int]) -> npt.NDArray[Any]:
    raise NotImplementedError


def read(path: Path, tokenizer: Path | None) -> Portable:
    raise NotImplementedError


def download(source: str) -> Path:
    raise NotImplementedError
