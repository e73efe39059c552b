"""Small language models that tell stories: `tinystories.load(model).generate("Once upon a time")`.

Importing this imports neither torch nor NumPy; names are looked up when they are used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.errors import UserError

if TYPE_CHECKING:
    import torch

    from tinystories.generate.stories import Story
    from tinystories.generate.storyteller import Storyteller, TokenScore

    __version__: str

__all__ = ["Story", "Storyteller", "TokenScore", "UserError", "__version__", "load"]

HOMES = {
    "Story": "tinystories.generate.stories",
    "Storyteller": "tinystories.generate.storyteller",
    "TokenScore": "tinystories.generate.storyteller",
}


def load(
    model: str | Path,
    *,
    engine: str = "auto",
    device: "str | torch.device" = "auto",
    precision: str = "auto",
) -> "Storyteller":
    """A storyteller from a model directory (what `tinystories train` writes).

    `device`: auto, cpu, cuda, cuda:1, mps. `precision`: auto, fp32, bf16 (where the hardware has it). `UserError` where
    the model is missing or damaged, or torch is not installed.
    """
    from tinystories.generate.storyteller import Storyteller

    return Storyteller.load(model, engine=engine, device=device, precision=precision)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version() -> str:
    """Of the installed distribution; "unknown" where the source is used without being installed."""
    from importlib import metadata

    try:
        return metadata.version("tinystories-gpt")
    except metadata.PackageNotFoundError:
        return "unknown"
