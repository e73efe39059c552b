"""Figures as PNG files, drawn the same way whatever the environment and the user's matplotlib settings say."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def png_figure(path: Path, size: tuple[float, float]) -> Iterator["Figure"]:
    """Yield a figure of `size` in inches to draw in; it is written to `path` when the block succeeds."""
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_file(path, sync=False) as file:
            figure.savefig(file, format="png")


def import_matplotlib() -> Any:
    """Import matplotlib with the backend Agg, which needs neither a display nor another package.

    Notebooks set MPLBACKEND for all programs they start, to a module that only exists in their own environment; reading
    it, the import fails.
    """
    previous = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib
    finally:
        if previous is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = previous
    return matplotlib


def plain_text(text: str) -> str:
    """Return a text of the user for a figure: dollar signs do not begin a formula, and every character can be drawn."""
    printable = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return printable.replace("$", r"\$")
