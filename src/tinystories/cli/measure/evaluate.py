"""`tinystories eval`."""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tinystories.cli.common import (
    CONTEXT_SETTINGS,
    device_option,
    engine_option,
    errors_option,
    json_option,
    model_argument,
    threads_option,
)
from tinystories.engine.engine_config import ENGINE_PRECISIONS, QUANTIZED_PRECISIONS, EngineConfig


@click.command("eval", context_settings=CONTEXT_SETTINGS)
@model_argument(bundled=True)
@click.option(
    "--data", required=True, help="Story file or folder, named source, or folder written by `tinystories prepare`."
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of JSONL, CSV and Parquet files."
)
@errors_option
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=0,
    help="Number of stories: the first of a file, evenly spaced ones of prepared data (0: all).",
)
@engine_option("Inference engine. auto: torch if it is installed, otherwise cpu.")
@device_option
@click.option(
    "--precision",
    type=click.Choice(ENGINE_PRECISIONS),
    default="auto",
    show_default=True,
    help="Weight precision. auto: fp32, as trained (torch on CUDA: bf16). int8 and int4 run on the cpu engine.",
)
@threads_option
@json_option
def evaluate(
    model: Path,
    data: str,
    text_field: str,
    errors: Any,
    limit: int,
    engine: str,
    device: str,
    precision: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL, or the bundled storyteller, in bits per byte over whole stories (docs/evaluation.md).

    Each story is scored on its own, after <|endoftext|>; its closing <|endoftext|> counts. Lower is better. With
    --precision int8 or int4, the difference to fp32 is the cost of quantization.
    """
    from tinystories.evaluate.report import evaluate_model
    from tinystories.generate.storyteller import Storyteller

    if engine == "auto":
        engine = "torch" if importlib.util.find_spec("torch") and precision not in QUANTIZED_PRECISIONS else "cpu"
    if engine == "cpu" and precision == "auto":
        precision = "fp32"  # by default, score the weights as they were trained
    storyteller = Storyteller.load(
        model, EngineConfig(engine=engine, device=device, precision=precision, threads=threads)
    )
    with show_progress("stories scored") as progress:
        report = evaluate_model(storyteller, data, text_field=text_field, errors=errors, limit=limit, progress=progress)
    low, high = report.interval
    click.echo(f"{report.bits_per_byte:.4f} bits per byte (95 % interval {low:.4f} to {high:.4f} over the stories)")
    click.echo(
        f"{report.nats_per_token:.4f} nats per token; {report.stories:,} stories, {report.tokens:,} tokens,"
        f" {report.bytes:,} bytes in {report.seconds:.1f} s"
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))


@contextlib.contextmanager
def show_progress(label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that updates a live count on stderr; it does nothing if stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"0 {label}") if console.is_terminal else contextlib.nullcontext() as status:
        yield lambda n: status.update(f"{n:,} {label}") if status else None
