"""Small language models that tell stories: `tinystories.load(model).generate("Once upon a time")`.

Importing the package imports nothing else: the exported names are resolved on first use. So the command line gets
control, and handles Ctrl-C, as soon as Python has started.
"""

TYPE_CHECKING = False  # as in `typing`, whose import takes a while; type checkers know the name

if TYPE_CHECKING:
    from typing import Any

    from tinystories.api import load
    from tinystories.errors import UserError
    from tinystories.explain.text_trace import TextTrace
    from tinystories.generate.batching import Story
    from tinystories.generate.next_token import NextToken
    from tinystories.generate.storyteller import Storyteller, TokenScore

    __version__: str

__all__ = ["NextToken", "Story", "Storyteller", "TextTrace", "TokenScore", "UserError", "__version__", "load"]

LAZY_EXPORTS = {
    "NextToken": "tinystories.generate.next_token",
    "Story": "tinystories.generate.batching",
    "Storyteller": "tinystories.generate.storyteller",
    "TextTrace": "tinystories.explain.text_trace",
    "TokenScore": "tinystories.generate.storyteller",
    "UserError": "tinystories.errors",
    "load": "tinystories.api",
}


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        return version()
    if name in LAZY_EXPORTS:
        import importlib

        return getattr(importlib.import_module(LAZY_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version() -> str:
    """Return the version of the installed distribution, or "unknown" if the package is not installed."""
    from importlib import metadata

    try:
        return metadata.version("tinystories-gpt")
    except metadata.PackageNotFoundError:
        return "unknown"
