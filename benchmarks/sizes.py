"""Size against quality: bits per byte of models in several precisions, and the size in megabytes of each.

A point is a model directory in one precision of the CPU engine, scored on all validation stories; its size is that of
the quantized weights (fp32: model.safetensors) plus the tokenizer. Previously recorded scores can be added to the plot.
Prints a table and one JSON line; draws --out.

    python benchmarks/sizes.py runs/small runs/storyteller --val stories/valid.txt --out sizes.png
"""

import argparse
import json
from pathlib import Path

from script import run_main

from tinystories import load
from tinystories.checkpoint import ModelFiles, read_model
from tinystories.evaluate.report import evaluate_model
from tinystories.weights.load import quantized_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories, optionally as LABEL=DIRECTORY")
    parser.add_argument("--val", required=True, help="validation stories")
    parser.add_argument("--precisions", default="int8,int4", help="comma-separated: int8, int4, fp32")
    parser.add_argument(
        "--recorded",
        nargs=2,
        action="append",
        default=[],
        metavar=("LABEL", "MB,BITS"),
        help="add a recorded point to the plot",
    )
    parser.add_argument("--out", type=Path, default=Path("sizes.png"), help="file of the plot")
    options = parser.parse_args()
    points = []
    for model_spec in options.models:
        label, _, folder = model_spec.rpartition("=")
        for precision in options.precisions.split(","):
            score = evaluate_model(load(folder, engine="cpu", precision=precision), options.val).bits_per_byte
            size = model_megabytes(read_model(folder), precision)
            points.append((label or Path(folder).name, precision, size, score))
            print(f"{points[-1][0]:28} {precision:5} {size:7.2f} MB  {score:.4f} bits per byte", flush=True)
    for label, numbers in options.recorded:
        size, score = map(float, numbers.split(","))
        points.append((label, "recorded", size, score))
    draw(options.out, points)
    names = ("model", "precision", "megabytes", "bits_per_byte")
    print(json.dumps({"benchmark": "sizes", "results": [dict(zip(names, point, strict=True)) for point in points]}))


def model_megabytes(files: ModelFiles, precision: str) -> float:
    weights = files.weights_path if precision == "fp32" else quantized_path(files, precision)  # type: ignore[arg-type]
    return (weights.stat().st_size + (files.folder / "tokenizer.json").stat().st_size) / 1e6


def draw(path: Path, points: list[tuple[str, str, float, float]]) -> None:
    """Plot bits per byte against size, one color per precision."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for precision in dict.fromkeys(point[1] for point in points):
        series = [point for point in points if point[1] == precision]
        axes.plot([point[2] for point in series], [point[3] for point in series], "o", label=precision)
        for label, _, size, score in series:
            offset = (6, 4) if precision == "recorded" else (6, -10)
            axes.annotate(label, (size, score), textcoords="offset points", xytext=offset, fontsize=8)
    axes.set(xlabel="megabytes, tokenizer included", ylabel="bits per byte on validation stories")
    axes.set_xlim(0, 1.35 * max(point[2] for point in points))  # room for the labels on the right
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
