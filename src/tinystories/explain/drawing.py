"""Text, boxes, scales and axes for `explain.pictures`, by matplotlib."""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_CHARS = 14  # longer labels are cut


def root_scale() -> Any:
    """Return the scale of attention: the square root of the probability, so that small ones stay visible."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


def add_scale(figure: "Figure", axes: Any, image: Any, ticks: list[float], label: str) -> None:
    """Add a color scale in percent beside the axes."""
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, pad=0.01, ticks=ticks)
    bar.ax.set_yticklabels([percent(tick) for tick in ticks], fontsize=8)
    bar.set_label(label, fontsize=8)
    bar.outline.set_visible(False)


def percent(share: float) -> str:
    """Return a share in percent with two significant digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def style_ticks(axes: Any, size: float, *, top: bool = False) -> None:
    """Show labels without tick marks, and no frame; with `top`, the labels of x are above."""
    axes.tick_params(length=0, labelsize=size)
    if top:
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_parse_math(False)


def frame(axes: Any, at: tuple[float, float], size: float) -> None:
    """Draw a frame around a square."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(at, size, size, fill=False, edgecolor="#d55e00", linewidth=2, clip_on=False))


def add_axes(figure: "Figure") -> Any:
    """Return axes for the whole figure, whose layout engine leaves a margin around what is drawn."""
    engine = figure.get_layout_engine()
    assert engine is not None, "png_figure sets one"
    engine.set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg]
    return figure.subplots()


def add_page(figure: "Figure", width: float, height: float) -> Any:
    """Return axes that fill the figure, in points from its upper left corner."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def draw_box(axes: Any, at: tuple[float, float], width: float, height: float, color: str) -> None:
    """Draw a filled rectangle from its upper left corner."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(at, width, height, facecolor=color, edgecolor="#bbbbbb", linewidth=0.4))


def draw_text(axes: Any, at: tuple[float, float], text: str, *, align: str = "left", **style: Any) -> None:
    """Draw text as it is: dollar signs do not begin a formula."""
    axes.text(*at, text, horizontalalignment=align, verticalalignment="center", parse_math=False, **style)


def draw_note(figure: "Figure", text: str) -> None:
    """Write a line below everything else."""
    figure.supxlabel(text, fontsize=8, color="#444444")


def cut(label: str, length: int = LABEL_CHARS) -> str:
    """Shorten a label that would not fit."""
    return label if len(label) <= length else label[: length - 1] + "…"


def drawable(label: str) -> str:
    """Replace characters that the font does not have, such as emoji, by their code: U+1F98A."""
    return "".join(char if ord(char) in font_characters() else f"U+{ord(char):04X}" for char in label)


@functools.cache
def font_characters() -> frozenset[int]:
    """Return the characters of DejaVu Sans, which comes with matplotlib."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def text_width(text: str, size: float) -> float:
    """Return the width of a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=size, prop=FontProperties("DejaVu Sans")).get_extents().x1)
