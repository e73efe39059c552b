"""Pictures of a trace as PNG files: words, attention, logit lens. Needs matplotlib.

Every color has a number beside it or on a scale, and the scales can be read by color-blind people.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinystories.engine.trace.trace import check_layer
from tinystories.errors import UserError
from tinystories.explain.drawing import (
    add_axes,
    add_page,
    add_scale,
    cut,
    draw_box,
    draw_note,
    draw_text,
    drawable,
    frame,
    percent,
    root_scale,
    style_ticks,
    text_width,
)
from tinystories.explain.text_trace import TextTrace, stage_name
from tinystories.explain.token_text import token_label
from tinystories.explain.words_html import MAX_BITS, shade, text_color
from tinystories.figure import png_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float32]
MAP_NAME = "cividis"  # of attention: dark blue to yellow
MAX_THUMBNAIL = 96  # pixels; longer texts are reduced to it
HEAD_TOKENS, LENS_TOKENS = 40, 14  # at the end of a text, that fit into a picture with labels
NUMBERED_TOKENS = 24  # up to this many, the cells of a head have numbers
INCHES_WIDE, POINTS_PER_INCH = 9.0, 72


def save_pictures(
    trace: TextTrace, folder: Path, *, layer: int | None = None, head: int | None = None, last: int | None = None
) -> list[Path]:
    """Write the pictures of a trace into a folder; return their paths. See `TextTrace.save_pictures`."""
    check_matplotlib()
    if last is not None and last < 1:
        raise UserError(f"last={last} must be at least 1")
    layer, head = select_head(trace, layer, head)
    paths = [folder / name for name in ("words.png", "attention.png", f"attention-{layer}-{head}.png", "lens.png")]
    folder.mkdir(parents=True, exist_ok=True)
    draw_words(trace, paths[0])
    draw_all_heads(trace, paths[1], (layer, head))
    draw_head(trace, paths[2], layer, head, last or HEAD_TOKENS)
    draw_lens(trace, paths[3], last or LENS_TOKENS)
    return paths


def check_matplotlib() -> None:
    """Raise `UserError` if matplotlib is not installed; does not import it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is not installed; run: pip install matplotlib")


def select_head(trace: TextTrace, layer: int | None, head: int | None) -> tuple[int, int]:
    """Return the head to draw large, among those of the layer or with the number that are given.

    It is the one that attends most to tokens other than itself and the first. Raises `UserError` if it does not exist.
    """
    config = trace.config
    if layer is not None:
        check_layer(layer, config)
    if head is not None and not 0 <= head < config.n_head:
        raise UserError(f"head {head} does not exist: a layer has {config.n_head}, numbered from 0")
    layers = range(config.n_layer) if layer is None else [layer]
    heads = list(range(config.n_head)) if head is None else [head]

    def elsewhere(layer: int) -> Floats:
        attention = trace.layer_attention(layer)[heads]
        to_itself = attention.diagonal(axis1=1, axis2=2)[:, 1:]
        return (1 - attention[:, 1:, 0] - to_itself).sum(axis=1)

    shares = {(at, heads[i]): share for at in layers for i, share in enumerate(elsewhere(at).tolist())}
    return max(shares, key=lambda pair: shares[pair])


def draw_words(trace: TextTrace, path: Path) -> None:
    """Draw the text with each token shaded by its surprise, and the number below it."""
    margin, line_height, scale_height = 10, 34, 46  # points
    width = INCHES_WIDE * POINTS_PER_INCH
    lines = wrap_tokens(trace, width - 2 * margin)
    height = scale_height + line_height * len(lines) + margin
    with png_figure(path, (INCHES_WIDE, height / POINTS_PER_INCH)) as figure:
        axes = add_page(figure, width, height)
        draw_shade_scale(axes, trace, margin)
        for row, line in enumerate(lines):
            y = scale_height + row * line_height
            for i, x, chip_width in line:
                draw_chip(axes, (margin + x, y), chip_width, label_of(trace, i), trace.surprise_bits[i])


def wrap_tokens(trace: TextTrace, width: float) -> list[list[tuple[int, float, float]]]:
    """Return the lines of a text as lists of (token, x, width of its chip), in points.

    Lines break before a word, which is a token that begins with a space and those that follow without one, and after a
    newline. A word that is wider than a line is broken too.
    """
    gap, between = 4.0, 1.0
    chip_widths = [max(text_width(label_of(trace, i), 11) + 5, 17.0) for i in range(len(trace.ids))]  # 17: a number
    after_newline = [False, *(text.endswith("\n") for text in trace.texts[:-1])]
    word_starts = [i for i, text in enumerate(trace.texts) if i < 2 or text[:1].isspace() or after_newline[i]]
    lines: list[list[tuple[int, float, float]]] = [[]]
    x = 0.0
    for start, stop in itertools.pairwise([*word_starts, len(trace.ids)]):
        word_width = sum(chip_widths[start:stop]) + between * (stop - start - 1)
        for i in range(start, stop):
            needed = word_width if i == start and word_width <= width else chip_widths[i]
            if x + gap + needed > width or (after_newline[i] and not trace.texts[i].startswith("\n")):
                lines.append([])
                x = 0.0
            if lines[-1]:
                x += gap if i == start else between
            lines[-1].append((i, x, chip_widths[i]))
            x += chip_widths[i]
    return [line for line in lines if line]


def label_of(trace: TextTrace, i: int) -> str:
    """Return the label of a token among its neighbors: without the mark of its leading space."""
    return drawable(trace.labels[i].removeprefix("·") or "·")


def draw_shade_scale(axes: Any, trace: TextTrace, margin: float) -> None:
    """Draw what the shades mean above the text."""
    x = margin
    n = len(trace.ids)
    summary = f"{count_tokens(n)}, mean {trace.mean_bits:.2f} bits" if n > 1 else count_tokens(n)
    draw_text(axes, (x, 16), f"Surprise of each token in bits ({summary})", size=10, weight="bold")
    for bits in range(0, int(MAX_BITS) + 1, 2):
        background, color = shade(bits)
        more = "+" if bits == MAX_BITS else ""
        draw_box(axes, (x, 24), 17, 13, background)
        draw_text(axes, (x + 8.5, 30.5), f"{bits}{more}", size=7, color=color, align="center")
        draw_text(axes, (x + 20, 30.5), f"= {percent(2.0**-bits)} likely", size=7, color="#444444")
        x += 92


def draw_chip(axes: Any, at: tuple[float, float], width: float, label: str, bits: float) -> None:
    """Draw one token with its surprise below it; a gray one if it has none."""
    background, color = shade(bits)
    x, y = at
    draw_box(axes, at, width, 27, background)
    draw_text(axes, (x + width / 2, y + 9.5), label, size=11, color=color, align="center")
    number = "" if np.isnan(bits) else f"{bits:.1f}"
    draw_text(axes, (x + width / 2, y + 21), number, size=6.5, color=color, align="center")


def draw_all_heads(trace: TextTrace, path: Path, marked: tuple[int, int]) -> None:
    """Draw the attention of all heads as thumbnails, a row for each layer; `marked` (layer, head) gets a frame."""
    n_layer, n_head, T = trace.config.n_layer, trace.config.n_head, len(trace.ids)
    size = min(T, MAX_THUMBNAIL)
    step = size * 1.08  # from one thumbnail to the next
    inches = min(1.5, 12 / n_head)
    with png_figure(path, (1.7 + inches * n_head, 0.8 + inches * n_layer)) as figure:
        axes = add_axes(figure)
        for layer in range(n_layer):
            for head, attention in enumerate(trace.layer_attention(layer)):
                x, y = head * step, layer * step
                image = axes.imshow(
                    hide_future(shrink(attention, size)),
                    extent=(x, x + size, y + size, y),
                    cmap=MAP_NAME,
                    norm=root_scale(),
                    interpolation="nearest" if size < MAX_THUMBNAIL else "auto",
                )
        frame(axes, (marked[1] * step, marked[0] * step), size)
        axes.set_xlim(-0.02 * size, n_head * step)
        axes.set_ylim(n_layer * step, -0.02 * size)
        axes.set_xticks([head * step + size / 2 for head in range(n_head)], [f"head {i}" for i in range(n_head)])
        axes.set_yticks([layer * step + size / 2 for layer in range(n_layer)], [f"layer {i}" for i in range(n_layer)])
        style_ticks(axes, top=True, size=8 if inches > 1 else 7)
        axes.set_title(
            f"Attention of {count_tokens(T)}. Down: the token that reads; across: the token read", fontsize=10
        )
        add_attention_scale(figure, axes, image)


def draw_head(trace: TextTrace, path: Path, layer: int, head: int, last: int) -> None:
    """Draw the attention of one head among the last tokens of the text, with their labels."""
    attention = trace.layer_attention(layer)[head][-last:, -last:]
    n, T = len(attention), len(trace.ids)
    labels = [cut(drawable(label)) for label in trace.labels[-n:]]
    inches = max(3.0, (0.34 if n <= NUMBERED_TOKENS else 0.19) * n)
    with png_figure(path, (inches + 2.2, inches + 1.6)) as figure:
        axes = add_axes(figure)
        image = axes.imshow(hide_future(attention), cmap=MAP_NAME, norm=root_scale())
        axes.set_xticks(range(n), labels, rotation=90)
        axes.set_yticks(range(n), labels)
        style_ticks(axes, top=True, size=8 if n <= HEAD_TOKENS else 6)
        if n <= NUMBERED_TOKENS:
            for row, column in zip(*np.nonzero(attention >= 0.045), strict=True):
                share = attention[row, column]
                color = text_color(*image.to_rgba(share)[:3])
                draw_text(axes, (column, row), f"{100 * share:.0f}", size=7, color=color, align="center")
        part = "" if n == T else f" (last {n} of {T} tokens)"
        axes.set_xlabel("token read", fontsize=9)
        axes.set_ylabel("token that reads", fontsize=9)
        axes.set_title(f"Layer {layer}, head {head}: attention in %{part}", fontsize=10)
        add_attention_scale(figure, axes, image)


def draw_lens(trace: TextTrace, path: Path, last: int) -> None:
    """Draw the logit lens: after each of the last tokens, what every stage would predict."""
    T = len(trace.ids)
    positions = range(max(0, T - last), T)
    lens = trace.logit_lens(top=1, positions=positions)
    S, n = lens.top_probs.shape[:2]
    texts = [[drawable(token_label(trace.tokenizer, int(token))) for token in row] for row in lens.top_ids[:, :, 0]]
    with png_figure(path, (1.6 + 0.82 * n, 1.9 + 0.36 * S)) as figure:
        axes = add_axes(figure)
        image = axes.imshow(lens.top_probs[:, :, 0], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for stage in range(S):
            for column in range(n):
                prob = lens.top_probs[stage, column, 0]
                color = text_color(*image.to_rgba(prob)[:3])
                is_final = lens.top_ids[stage, column, 0] == lens.final_ids[column]
                weight = "bold" if is_final else "normal"
                label = cut(texts[stage][column], 10)
                draw_text(axes, (column, stage - 0.14), label, size=7.5, color=color, align="center", weight=weight)
                draw_text(axes, (column, stage + 0.27), f"{100 * prob:.0f} %", size=6.5, color=color, align="center")
        following = [*trace.labels[positions.start + 1 :], "?"]
        axes.set_xticks(range(n), [cut(drawable(trace.labels[i])) for i in positions])
        axes.set_yticks(range(S), [stage_name(stage) for stage in range(S)])
        style_ticks(axes, top=True, size=8)
        next_axis = axes.secondary_xaxis("bottom")
        next_axis.set_xticks(range(n), [cut(drawable(label)) for label in following])
        style_ticks(next_axis, size=8)
        axes.set_xlabel("after this token", fontsize=9)
        next_axis.set_xlabel("the token that follows in the text", fontsize=9)
        axes.set_title("Logit lens: the likeliest next token at each stage (bold: as in the last stage)", fontsize=10)
        add_scale(figure, axes, image, [0, 0.25, 0.5, 0.75, 1], "probability")
        draw_note(figure, "Early stages are read through the norm and head of the last one: take them with caution.")


def shrink(attention: Floats, size: int) -> Floats:
    """Reduce a matrix (T, T) to (size, size): the largest value of each block, so that single bright cells stay."""
    if len(attention) <= size:
        return attention
    starts = np.arange(size) * len(attention) // size
    return np.maximum.reduceat(np.maximum.reduceat(attention, starts, axis=0), starts, axis=1)


def hide_future(attention: Floats) -> Any:
    """Mask what lies above the diagonal: a token cannot read later ones."""
    return np.ma.masked_array(attention, np.triu(np.ones(attention.shape, dtype=bool), k=1))


def add_attention_scale(figure: "Figure", axes: Any, image: Any) -> None:
    """Add the scale of attention probabilities beside the axes."""
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    add_scale(figure, axes, image, ticks, "attention")


def count_tokens(n: int) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{n} token{'s' if n > 1 else ''}"
