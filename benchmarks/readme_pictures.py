"""The two pictures at the top of README.md: a terminal that tells a story, and our curve beside nanoGPT's.

The story comes from the bundled storyteller, the curve from a folder that `benchmarks/token_efficiency.py` made. The
same story, runs and matplotlib give the same bytes. Writes terminal.svg and curve.svg.

    python benchmarks/readme_pictures.py --seed 49
"""

import argparse
import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from script import run_main
from training_runs import read_records

import tinystories

ROOT = Path(__file__).parent.parent
PEER = "nanogpt_0.002_8_8.19M"
OURS = ("ours_2.34M_seed1", "ours_2.34M_seed2", "ours_2.34M_seed3")

COLUMNS, FONT_SIZE, LINE_HEIGHT = 72, 15, 22
CHARACTER_WIDTH = 0.602 * FONT_SIZE  # of Menlo and DejaVu Sans Mono; other monospace fonts are no wider
MARGIN, TITLE_BAR = 22, 36

BLUE, GRAY = "#0969da", "#57606a"
ARROW_HEIGHT = 0.685  # bits per byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=49, help="seed of the story")
    parser.add_argument("--runs", type=Path, default=ROOT / "results" / "2026-11-24-token-efficiency")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    story = tinystories.load(engine="cpu").generate(seed=options.seed).text
    picture = draw_terminal(f"tinystories generate --seed {options.seed}", story)
    (options.out / "terminal.svg").write_text(picture, encoding="utf-8", newline="\n")
    draw_curve(options.runs, options.out / "curve.svg")
    print(f"wrote {options.out}/terminal.svg and curve.svg")


def draw_terminal(command: str, story: str) -> str:
    """An SVG of a dark terminal window: the command, then the story, wrapped."""
    lines = [line for paragraph in story.splitlines() for line in textwrap.wrap(paragraph, COLUMNS)]
    width = round(2 * MARGIN + COLUMNS * CHARACTER_WIDTH)
    height = TITLE_BAR + 2 * MARGIN + (len(lines) + 2) * LINE_HEIGHT
    top = TITLE_BAR + MARGIN + FONT_SIZE
    rows = [f'<tspan fill="#7ee787">$</tspan> <tspan fill="#ffffff">{html.escape(command)}</tspan>']
    rows += [html.escape(line, quote=False) for line in lines]
    rows += ['<tspan fill="#7ee787">$</tspan> <tspan fill="#8b949e">█</tspan>']
    texts = [f'<text x="{MARGIN}" y="{top + i * LINE_HEIGHT}">{row}</text>' for i, row in enumerate(rows)]
    lights = [
        f'<circle cx="{20 + 20 * i}" cy="{TITLE_BAR // 2}" r="6" fill="{color}"/>'
        for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    size = f'width="{width}" height="{height}"'
    bar = f"M0 {TITLE_BAR}V10a10 10 0 0 1 10-10h{width - 20}a10 10 0 0 1 10 10v{TITLE_BAR - 10}z"
    font = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">',
        f"<title>{html.escape(command)}</title>",
        f'<rect {size} rx="10" fill="#0d1117"/>',
        f'<path d="{bar}" fill="#21262d"/>',
        *lights,
        f'<g font-family="{font}" font-size="{FONT_SIZE}" fill="#c9d1d9">',
        *texts,
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def draw_curve(runs: Path, path: Path) -> None:
    """Bits per byte against training tokens: the mean of our seeds, and the peer."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "tinystories", "svg.fonttype": "path", "font.size": 12})
    ours, our_end = average_curve(runs, OURS)
    peer, peer_end = average_curve(runs, [PEER])
    figure, axes = plt.subplots(figsize=(7.2, 3.57), layout="constrained")  # the terminal's proportions
    for points, end, color in ((peer, peer_end, GRAY), (ours, our_end, BLUE)):
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2.2)
        axes.plot(*end, "o", color=color, markersize=8)
        axes.plot([end[0]] * 2, [end[1], ARROW_HEIGHT], color=color, linewidth=1, linestyle=":")
        axes.text(end[0] + 0.13, end[1] + 0.012, f"{end[1]:.3f}", color=color, va="bottom")
    arrow = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(our_end[0], ARROW_HEIGHT), xytext=(peer_end[0], ARROW_HEIGHT), arrowprops=arrow)
    ratio, middle = f"{peer_end[0] / our_end[0]:.1f}x fewer tokens", (our_end[0] + peer_end[0]) / 2
    axes.text(middle, ARROW_HEIGHT + 0.015, ratio, color=BLUE, fontsize=17, fontweight="bold", ha="center", va="bottom")
    axes.text(1.35, 0.96, "tinystories", color=BLUE, fontweight="bold")
    axes.text(3.2, 1.02, "nanoGPT, tuned", color=GRAY, fontweight="bold")
    axes.set(xlim=(0, 9.2), ylim=(0.64, 1.45), xlabel="million training tokens")
    axes.set_ylabel("bits per byte (lower is better)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def average_curve(runs: Path, names: Sequence[str]) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """(million tokens, bits per byte) on a subset of the stories, and of the last evaluation, on all; means of runs."""
    evaluations = [[r for r in read_records(runs / name) if "val_bits_per_byte" in r] for name in names]
    *points, end = [
        (mean(r["tokens"] for r in same) / 1e6, mean(r["val_bits_per_byte"] for r in same))
        for same in zip(*evaluations, strict=True)
    ]
    return points, end


if __name__ == "__main__":
    run_main(main)
