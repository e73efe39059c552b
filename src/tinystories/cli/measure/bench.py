"""`tinystories bench`: generation speed on this machine, also compared with other programs on the same weights."""

import contextlib
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import PATH, add_options, json_option
from tinystories.config import ModelConfig
from tinystories.config_file import PRESETS, load_config
from tinystories.errors import UserError

if TYPE_CHECKING:
    from tinystories.bench.runner import Measurement, Task
    from tinystories.bench.setup import Competitor

log = logging.getLogger(__name__)

DEFAULT_PRESET = "modern-89m"


@click.group()
def bench() -> None:
    """Measure speed: one stream, many streams, or process startup.

    With --peers, every installed program (llama.cpp via llama-cpp-python, CTranslate2, Hugging Face transformers, the
    torch engine) gets the same weights and takes turns with tinystories, each in its own process.
    """


def parse_only(_context: click.Context, _option: click.Parameter, only: str | None) -> "list[Competitor]":
    """Parse --only; return an empty list if it was not given."""
    from tinystories.bench.setup import parse_competitors

    return parse_competitors(only) if only else []


common_options = add_options(
    click.argument("model", type=PATH, required=False),
    click.option("--peers", is_flag=True, help="Also run every other program that is installed."),
    click.option(
        "--only",
        callback=parse_only,
        metavar="NAME[,NAME...]",
        help="Run only these: tinystories, torch, transformers, ctranslate2, llama.cpp; NAME or NAME:PRECISION.",
    ),
    click.option("--runs", type=click.IntRange(min=1), default=5, help="Measured rounds (after a warm-up)."),
    click.option("--threads", type=click.IntRange(min=1), help="Threads of each program.  [default: number of cores]"),
    json_option,
)
speed_options = add_options(
    common_options,
    click.option(
        "--preset",
        help=f"Random weights of this preset or TOML file: {', '.join(PRESETS)}.  [default: {DEFAULT_PRESET}]",
    ),
    click.option("--vocab", type=click.IntRange(min=2), default=50257, help="Vocabulary size of the random model."),
    click.option(
        "--cpu-seconds",
        is_flag=True,
        help="Count processor time instead of time: for a busy machine, with --threads 1.",
    ),
)


@bench.command()
@speed_options
@click.option("--tokens", type=click.IntRange(min=2), default=200, help="Tokens to generate, greedily.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=256, help="Prompt length for prefill.")
@click.option(
    "--shortlist",
    type=click.IntRange(min=2),
    metavar="N",
    help="Also run tinystories with the logits of only N ids, as in `generate --shortlist` (here the first N).",
)
def decode(tokens: int, prompt_tokens: int, shortlist: int | None, **options: Any) -> dict[str, Any]:
    """Benchmark one stream: prefill of a prompt, and decode after a prompt of 8 tokens."""
    from tinystories.bench.runner import Task

    prefill, decode = Task("prefill", 1, prompt_tokens, 1, prompt_tokens), Task("decode", 1, 8, tokens, tokens)
    facts = {"prompt_tokens": prompt_tokens, "tokens": tokens}
    return compare([prefill, decode], facts, options, capacity=max(tokens + 8, prompt_tokens), shortlist=shortlist or 0)


@bench.command()
@speed_options
@click.option("--streams", type=click.IntRange(min=1), default=32, help="Streams to generate at once.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, help="Tokens to generate per stream.")
def batch(streams: int, tokens: int, **options: Any) -> dict[str, Any]:
    """Benchmark many streams at once, each after its own prompt of 8 tokens; the rate counts all streams."""
    from tinystories.bench.runner import Task

    task = Task("batch", streams, 8, tokens, tokens * streams)
    return compare([task], {"streams": streams, "tokens": tokens}, options, capacity=tokens + 8)


def compare(
    tasks: "Sequence[Task]", facts: dict[str, int], options: dict[str, Any], *, capacity: int, shortlist: int = 0
) -> dict[str, Any]:
    """Run the tasks in one process per competitor, print a table of each, and return everything for the JSON.

    With `shortlist`, tinystories takes part a second time, with an output head of only that many ids. `capacity` is
    the number of tokens that each stream must hold. `UserError` if the options do not fit the model.
    """
    import numpy as np

    from tinystories.bench.competitors import Workload
    from tinystories.bench.runner import BenchProcess, run_rounds
    from tinystories.bench.setup import prepare_competitors

    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model, config = prepare_weights(folder, options)
        if capacity > config.n_ctx:
            raise UserError(
                f"{capacity} tokens exceed the model's context of {config.n_ctx}; lower --tokens or --prompt-tokens"
            )
        if shortlist >= config.vocab_size:
            raise UserError(f"--shortlist {shortlist:,} must be below the vocabulary size, {config.vocab_size:,}")
        selected = prepare_competitors(folder, config, options["only"], peers=options["peers"])
        if shortlist and all(competitor.name != "tinystories" for competitor in selected):
            raise UserError("--shortlist applies to tinystories, which --only leaves out")
        threads = options["threads"] or count_cores()
        if options["cpu_seconds"] and threads != 1:
            raise UserError("--cpu-seconds requires --threads 1: threads that wait for each other use processor time")
        workload = Workload(threads=threads, streams=tasks[0].streams, tokens=capacity)
        processes = []
        for competitor in selected:
            log.info("starting %s", competitor)
            for size in (0, shortlist) if shortlist and competitor.name == "tinystories" else (0,):
                process = BenchProcess(competitor._replace(shortlist=size), folder, workload)
                processes.append(stack.enter_context(contextlib.closing(process)))
        rng, results = np.random.default_rng(0), {}
        for task in tasks:
            prompts = rng.integers(config.vocab_size, size=(task.streams, task.prompt_tokens)).tolist()
            measurements = run_rounds(processes, task, prompts, options["runs"], by_cpu_seconds=options["cpu_seconds"])
            results[task.name] = report_task(task.name, measurements)
    click.echo('"same ids": share of the greedy ids before the first that differs from the first row')
    settings = {"model": model, "parameters": config.n_params, "threads": threads, **facts}
    settings["cpu_seconds"] = options["cpu_seconds"]
    return {"benchmark": tasks[-1].name, **settings, **results, **describe_machine(selected)}


def prepare_weights(folder: Path, options: dict[str, Any]) -> tuple[str, ModelConfig]:
    """Put weights into `folder`, MODEL's or random ones of a preset; return the name of either, and the config."""
    from tinystories.bench.setup import link_weights, write_random_weights

    model, preset = options["model"], options["preset"] or DEFAULT_PRESET
    if model and options["preset"]:
        raise UserError("give either MODEL or --preset, not both")
    if model:
        return str(model), link_weights(folder, model)
    config = dataclasses.replace(load_config(preset).model, vocab_size=options["vocab"], dropout=0.0)
    log.info("random weights of %s: %s parameters", preset, f"{config.n_params:,}")
    write_random_weights(folder, config)
    return preset, config


def report_task(task: str, measurements: "Sequence[Measurement]") -> dict[str, Any]:
    """Print the table and the ratios of one task, and return its results for the JSON."""
    from tinystories.bench.runner import speed_ratios

    results = {str(measurement.competitor): measurement for measurement in measurements}
    same_ids = {label: m.same_ids(measurements[0]) for label, m in results.items()}
    rows = []
    for label, m in results.items():
        rates = (f"{rate:,.1f}" for rate in (m.median, min(m.rates), max(m.rates)))
        rows.append([label, *rates, f"{m.peak_mb:,.0f}" if m.peak_mb else "?", f"{same_ids[label]:.0%}"])
    print_table([task, "tokens/s", "min", "max", "peak MB", "same ids"], rows)
    ratios = speed_ratios(measurements)
    for name, ratio in ratios.items():
        click.echo(f"  {name}: {ratio:.2f}")
    return {
        "tokens_per_s": {label: round(m.median, 2) for label, m in results.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "peak_mb": {label: m.peak_mb for label, m in results.items()},
        "same_ids": same_ids,
        "runs": {label: [round(rate, 2) for rate in m.rates] for label, m in results.items()},
    }


@bench.command()
@common_options
def startup(
    model: Path | None, peers: bool, only: "list[Competitor]", runs: int, threads: int | None
) -> dict[str, Any]:
    """Benchmark whole processes that generate one token: `tinystories generate` and others.

    MODEL is required. tinystories tokenizes a prompt and prints text; the other programs only handle token ids.
    """
    if model is None:
        raise UserError("bench startup requires MODEL: a directory written by `tinystories train`")
    from tinystories.bench.runner import time_startup
    from tinystories.bench.setup import link_weights, prepare_competitors

    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name:
        folder = Path(name)
        selected = prepare_competitors(folder, link_weights(folder, model), only, peers=peers)
        commands = {str(competitor): startup_command(competitor, model, folder, threads) for competitor in selected}
        seconds = time_startup(commands, runs)
    baseline, rows, medians = next(iter(seconds.values())), [], {}
    for label, timings in seconds.items():
        medians[label] = statistics.median(timings)
        ratio = statistics.median(a / b for a, b in zip(timings, baseline, strict=True))
        rows.append([label, *(f"{x:.2f}" for x in (medians[label], min(timings), max(timings), ratio))])
    print_table(["whole process, one token", "seconds", "min", "max", "vs. first"], rows)
    return {"benchmark": "startup", "seconds": medians, "runs": seconds, **describe_machine(selected)}


def startup_command(competitor: "Competitor", model: Path, folder: Path, threads: int | None) -> tuple[list[str], str]:
    """Return the command line and the stdin text of a process that generates one token."""
    from tinystories.bench.competitors import Workload
    from tinystories.bench.runner import child_command

    name, precision, _ = competitor
    if name in ("tinystories", "torch"):
        command = [sys.executable, "-m", "tinystories", "generate", str(model), "--max-tokens", "1", "--precision"]
        command += [precision, "--engine", "torch" if name == "torch" else "cpu", "--prompt", "Once"]
        return command + (["--threads", str(threads)] if threads and name == "tinystories" else []), ""
    workload = Workload(threads=threads or count_cores(), streams=1, tokens=16)
    return child_command(competitor, folder, workload), json.dumps({"prompts": [[1]], "tokens": 1}) + "\n"


def describe_machine(competitors: "Iterable[Competitor]") -> dict[str, Any]:
    """Return what the measurements depend on: versions of all programs, Python, machine and cores."""
    import platform

    from tinystories.bench.setup import package_version

    return {
        "versions": {c.name: package_version(c.name) for c in competitors},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": count_cores(),
    }


def count_cores() -> int:
    from tinystories.engine.cpu.thread_pool import count_physical_cores

    return count_physical_cores()


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table whose columns, except the first, are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)
