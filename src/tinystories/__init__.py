"""Small language models that tell stories: `tinystories.load(model).generate("Once upon a time")`.

Importing this imports neither torch nor NumPy; names are looked up when they are used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    engine: str = "auto",
    device: "str | torch.device" = "auto",
    precision: str = "auto",
    threads: int | None = None,
    shortlist: bool = False,
) -> "Storyteller":
    """A storyteller from a model directory (what `tinystories train` writes), or hf:OWNER/NAME[@REVISION] on the Hub.

    Without `model` it is the one that comes with the package.

    `engine`: auto, cpu, torch; auto is cpu but where CUDA is at hand. `device` of torch: auto, cpu, cuda, cuda:1, mps.
    `precision`: auto, fp32; int8, int4 (cpu); bf16 (torch, where the hardware has it). `threads` of the CPU engine: as
    many as there are cores. `shortlist`: write only the ids that `tinystories pack --shortlist` chose (cpu), which is
    faster. `UserError` where the model is missing or damaged, or what it needs is not installed.
    """
    from tinystories.generate.storyteller import Storyteller
    from tinystories.interop.hub import resolve_model_folder

    return Storyteller.load(
        resolve_model_folder(model),
        engine=engine,
        device=device,
        precision=precision,
        threads=threads,
        shortlist=shortlist,
    )


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in LAZY_EXPORTS:
        return getattr(importlib.import_module(LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version() -> str:
    """Of the installed distribution; "unknown" where the source is used without being installed."""
    from importlib import metadata

    try:
        return metadata.version("tinystories-gpt")
    except metadata.PackageNotFoundError:
        return "unknown"
