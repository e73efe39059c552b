"""`tinystories eval`."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import FILE, engine_options, errors_option, json_option, model_argument

if TYPE_CHECKING:
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.generate.storyteller import Storyteller

TASK_NAMES = ("characters", "things")  # of evaluate.items, whose import would slow down --help


def parse_tasks(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names of tasks, each once."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name not in TASK_NAMES:
            raise click.BadParameter(f"{name!r} is not a task; the tasks are {', '.join(TASK_NAMES)}")
    return names


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
@click.option(
    "--tasks",
    metavar="TASK,...",
    callback=parse_tasks,
    help="Measure how well the model keeps the thread of a story, instead of bits per byte: characters (which of two"
    " characters acts), things (which of two things is meant), or both: characters,things.",
)
@click.option("--items", type=FILE, help="With --tasks: write what was asked, with the scores, to FILE.jsonl.")
@engine_options(
    "Inference engine. auto: torch if it is installed, otherwise cpu.",
    "Precision. auto: fp32, as trained (torch on CUDA: bf16). int8, int8-a8 and int4 run on the cpu engine.",
)
@json_option
def evaluate(
    model: Path,
    data: str,
    tasks: tuple[str, ...] | None,
    items: Path | None,
    engine_config: "EngineConfig",
    **reading: Any,
) -> dict[str, Any]:
    """Measure MODEL, or the bundled storyteller, in bits per byte over whole stories (docs/evaluation.md).

    Each story is scored on its own, after <|endoftext|>; its closing <|endoftext|> counts. Lower is better. With
    --precision int8, int8-a8 or int4, the difference to fp32 is the cost of quantization.

    With --tasks, the stories are searched for sentences with one of two characters, or one of two things, that the
    story has mentioned. The accuracy is the share of those that the model finds more likely as they are than with the
    other word: 0.5 is chance, 1 is perfect. Without the story before the sentence it should be near 0.5.

    \b
    tinystories eval --data stories.txt
    tinystories eval runs/small --data stories.txt --tasks characters,things --items items.jsonl
    """
    from tinystories.data.text_loss import mark_incomparable
    from tinystories.engine.engine_config import QUANTIZED_PRECISIONS
    from tinystories.evaluate.report import evaluate_model
    from tinystories.generate.storyteller import Storyteller

    if items is not None and tasks is None:
        raise click.UsageError("--items goes with --tasks")
    engine, precision = engine_config.engine, engine_config.precision
    if engine == "auto":
        engine = "torch" if importlib.util.find_spec("torch") and precision not in QUANTIZED_PRECISIONS else "cpu"
    if engine == "cpu" and precision == "auto":
        precision = "fp32"  # by default, score the weights as they were trained
    storyteller = Storyteller.load(model, dataclasses.replace(engine_config, engine=engine, precision=precision))
    if tasks is not None:
        return {"tasks": print_tasks(storyteller, data, tasks, items, reading)}
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


def print_tasks(
    storyteller: "Storyteller", data: str, tasks: tuple[str, ...], items_path: Path | None, reading: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Measure and print the accuracy of each task; return the reports by task, as in the JSON."""
    from tinystories.evaluate.tasks import build_task, check_items_path, evaluate_task, read_texts, write_items

    if items_path is not None:
        check_items_path(items_path)
    texts = read_texts(data, **reading)
    items = {task: build_task(task, texts) for task in tasks}
    reports, scores = {}, {}
    for task in tasks:
        with show_progress(f"of {len(items[task]):,} items scored ({task})") as progress:
            report, scores[task] = evaluate_task(storyteller, items[task], progress)
        (low, high), (alone_low, alone_high) = report.interval, report.sentence_alone_interval
        click.echo(
            f"{task}: {report.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f} over the stories);"
            f" sentence alone {report.sentence_alone:.3f} ({alone_low:.3f} to {alone_high:.3f});"
            f" {report.items:,} items of {report.stories:,} stories in {report.seconds:.1f} s"
        )
        reports[task] = dataclasses.asdict(report)
    if items_path is not None:
        write_items(items_path, items, scores)
    return reports


@contextlib.contextmanager
def show_progress(label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that updates a live count on stderr; it does nothing if stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"0 {label}") if console.is_terminal else contextlib.nullcontext() as status:
        yield lambda n: status.update(f"{n:,} {label}") if status else None
