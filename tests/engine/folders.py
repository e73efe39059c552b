"""Model directories for tests, and engines over them."""

from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu import weights
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.files import atomic_directory
from tinystories.model import GPT


def saved(folder: Path, model: GPT, data: Path) -> Path:
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(data), SamplingConfig(), {})
    return folder


def opened(folder: Path, precision: weights.Precision = "int8", **options: Any) -> CpuEngine:
    return CpuEngine.load(checkpoint.read_model(folder, check_weights=False), precision=precision, **options)
