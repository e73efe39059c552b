"""Engines and model directories for tests, and what all engines have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinystories import checkpoint
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.protocol import Engine
from tinystories.files import atomic_directory
from tinystories.model import GPT

Build = Callable[..., GPT]
IDS = np.random.default_rng(1).integers(0, 61, 24).tolist()


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance)


def uncached(model: GPT, ids: list[int]) -> np.ndarray:
    """Logits after each id, by one pass without a cache."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))[0].numpy()


def arrays_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in checkpoint.state_dict_to_save(model).items()}


def fp32(model: GPT, **options: Any) -> CpuEngine:
    return CpuEngine(model.config, arrays_of(model), EngineConfig(**{"n_slots": 1} | options))


def saved(
    folder: Path,
    model: GPT,
    data: Path,
    sampling: SamplingConfig | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model directory with the tokenizer of prepared data."""
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(data), sampling or SamplingConfig(), provenance or {})
    return folder


def opened(
    folder: Path, precision: str = "int8", *, shortlist_ids: np.ndarray | None = None, **options: Any
) -> CpuEngine:
    files = checkpoint.read_model(folder, verify_weights=False)
    return CpuEngine.load(
        files, EngineConfig(**{"precision": precision, "n_slots": 1} | options), shortlist_ids=shortlist_ids
    )


def exercise(engine: Engine, rng: np.random.Generator, logits_after: Callable[[list[int]], Any]) -> None:
    """Any order of prefills, frees and steps of any set of the 4 slots; contexts of at most 6 of 11 ids."""

    content: dict[int, list[int]] = {}
    for action in ["prefill"] * 4 + rng.choice(["prefill", "free", "step", "step", "step"], 8).tolist():
        slot = int(rng.integers(4))
        if action == "prefill":
            content[slot] = rng.integers(0, 11, rng.integers(1, 7)).tolist()
            close(engine.prefill(slot, content[slot]), logits_after(content[slot]))
        elif action == "free":
            engine.free(slot)
            content.pop(slot, None)
        elif ready := [slot for slot, ids in content.items() if len(ids) < 6]:
            slots = rng.permutation(ready)[: rng.integers(1, len(ready) + 1)].tolist()
            ids = rng.integers(0, 11, len(slots)).tolist()
            for slot, one in zip(slots, ids, strict=True):
                content[slot].append(one)
            close(engine.step(slots, ids), [logits_after(content[slot]) for slot in slots])
