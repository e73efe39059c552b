"""Small language models that tell stories: `tinystories.load(model).generate("Once upon a time")`.

Importing the package loads neither torch nor NumPy: the exported names are resolved on first use.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError

if TYPE_CHECKING:
    import torch

    from tinystories.generate.batching import Story
    from tinystories.generate.storyteller import Storyteller, TokenScore

    __version__: str

__all__ = ["Story", "Storyteller", "TokenScore", "UserError", "__version__", "load"]

LAZY_EXPORTS = {
    "Story": "tinystories.generate.batching",
    "Storyteller": "tinystories.generate.storyteller",
    "TokenScore": "tinystories.generate.storyteller",
}


def load(
    model: str | Path | None = None,
    *,
    engine: str = EngineConfig.engine,
    device: "str | torch.device" = EngineConfig.device,
    precision: str = EngineConfig.precision,
    n_slots: int = EngineConfig.n_slots,
    threads: int | None = EngineConfig.threads,
    shortlist: bool = EngineConfig.shortlist,
) -> "Storyteller":
    """Load a storyteller from a model directory, as written by `tinystories train`, or from the Hub.

    Args:
        model: a model directory, or hf:OWNER/NAME[@REVISION]. None: the model bundled with the package.
        engine: auto, cpu or torch. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).
        device: device of the torch engine: auto, cpu, cuda, cuda:1 or mps.
        precision: auto or fp32; int8 or int4 (cpu engine); bf16 (torch engine, if the hardware supports it).
        n_slots: stories generated at once.
        threads: threads of the CPU engine. None: one per core, but one to continue a story with a small model, which
            more would not make faster.
        shortlist: generate only token ids that `tinystories quantize --shortlist` selected; faster (cpu engine).

    Raises `UserError` if the model is missing or damaged, or if a package that it needs is not installed.
    """
    from tinystories.generate.storyteller import Storyteller
    from tinystories.hub.client import resolve_model_folder

    folder = resolve_model_folder(model)
    engine_config = EngineConfig(
        engine=engine, device=device, precision=precision, n_slots=n_slots, threads=threads, shortlist=shortlist
    )
    return Storyteller.load(folder, engine_config)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in LAZY_EXPORTS:
        return getattr(importlib.import_module(LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version() -> str:
    """Return the version of the installed distribution, or "unknown" if the package is not installed."""
    from importlib import metadata

    try:
        return metadata.version("tinystories-gpt")
    except metadata.PackageNotFoundError:
        return "unknown"
