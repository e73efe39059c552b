"""Model directories for tests, and engines over them."""

from pathlib import Path
from typing import Any

import numpy as np

from tinystories import checkpoint
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.files import atomic_directory
from tinystories.model import GPT


def saved(folder: Path, model: GPT, data: Path) -> Path:
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(data), SamplingConfig(), {})
    return folder


def opened(
    folder: Path, precision: str = "int8", *, shortlist_ids: np.ndarray | None = None, **options: Any
) -> CpuEngine:
    files = checkpoint.read_model(folder, check_weights=False)
    return CpuEngine.load(
        files, EngineConfig(**{"precision": precision, "n_slots": 1} | options), shortlist_ids=shortlist_ids
    )
