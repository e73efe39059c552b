"""The earlier name of `data.source.resolve`, kept for scripts that import it."""

from tinystories.data.source.resolve import iter_stories as stories

__all__ = ["stories"]
