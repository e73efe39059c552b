"""`tinystories eval`."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import engine_options, errors_option, json_option, model_argument

if TYPE_CHECKING:
    from tinystories.engine.engine_config import EngineConfig


@click.command("eval")
@model_argument(bundled=True)
@click.option(
    "--data", required=True, help="Story file or folder, named source, or folder written by `tinystories prepare`."
)
@click.option("--text-field", default="text", help="Field or column of JSONL, CSV and Parquet files.")
@errors_option
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=0,
    help="Number of stories: the first of a file, evenly spaced ones of prepared data (0: all).",
)
@engine_options(
    "Inference engine. auto: torch if it is installed, otherwise cpu.",
    "Weight precision. auto: fp32, as trained (torch on CUDA: bf16). int8 and int4 run on the cpu engine.",
)
@json_option
def evaluate(model: Path, data: str, engine_config: "EngineConfig", **reading: Any) -> dict[str, Any]:
    """Measure MODEL, or the bundled storyteller, in bits per byte over whole stories (docs/evaluation.md).

    Each story is scored on its own, after <|endoftext|>; its closing <|endoftext|> counts. Lower is better. With
    --precision int8 or int4, the difference to fp32 is the cost of quantization.
    """
    from tinystories.data.text_loss import mark_incomparable
    from tinystories.engine.engine_config import QUANTIZED_PRECISIONS
    from tinystories.evaluate.report import evaluate_model
    from tinystories.generate.storyteller import Storyteller

    engine, precision = engine_config.engine, engine_config.precision
    if engine == "auto":
        engine = "torch" if importlib.util.find_spec("torch") and precision not in QUANTIZED_PRECISIONS else "cpu"
    if engine == "cpu" and precision == "auto":
        precision = "fp32"  # by default, score the weights as they were trained
    storyteller = Storyteller.load(model, dataclasses.replace(engine_config, engine=engine, precision=precision))
    with show_progress("stories scored") as progress:
        report = evaluate_model(storyteller, data, progress=progress, **reading)
    low, high = report.interval
    score = f"{report.bits_per_byte:.4f} bits per byte (95 % interval {low:.4f} to {high:.4f} over the stories)"
    click.echo(mark_incomparable(score, report.lost_text))
    click.echo(
        f"{report.nats_per_token:.4f} nats per token; {report.stories:,} stories, {report.tokens:,} tokens,"
        f" {report.bytes:,} bytes in {report.seconds:.1f} s"
    )
    return dataclasses.asdict(report)


@contextlib.contextmanager
def show_progress(label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that updates a live count on stderr; it does nothing if stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"0 {label}") if console.is_terminal else contextlib.nullcontext() as status:
        yield lambda n: status.update(f"{n:,} {label}") if status else None
