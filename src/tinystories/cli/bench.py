"""`tinystories bench`: how fast this machine writes, beside other programs with the same weights."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import click

from tinystories.cli.common import CONTEXT_SETTINGS, json_option
from tinystories.config import PRESETS, ModelConfig, load_config
from tinystories.errors import UserError

DEFAULT_PRESET = "modern-89m"
Competitor: TypeAlias = tuple[str, str]  # name and precision


@click.group(context_settings=CONTEXT_SETTINGS)
def bench() -> None:
    """Measure speed: one stream, many streams, or the start of a process.

    With --peers every program that is installed (llama.cpp by llama-cpp-python, CTranslate2, Hugging Face
    transformers, the torch engine) gets the same weights and takes turns with ours, each in a process of its own.
    """


def parse_only(_context: click.Context, _option: click.Parameter, only: str | None) -> list[Competitor]:
    """(name, precision) of each part of --only; none where it was not given."""
    from tinystories.interop.bench_competitors import PRECISIONS

    selected: list[Competitor] = []
    for part in only.split(",") if only else ():
        name, _, precision = part.strip().partition(":")
        if name not in PRECISIONS or (precision and precision not in PRECISIONS[name]):
            available = ", ".join(f"{n} ({', '.join(p)})" for n, p in PRECISIONS.items())
            raise UserError(f"--only {part.strip()}: there is no such program or precision; use {available}")
        selected += [(name, precision)] if precision else [(name, p) for p in PRECISIONS[name]]
    return selected


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Arguments that all benches have."""
    options = [
        click.argument("model", type=click.Path(path_type=Path), required=False),
        click.option("--peers", is_flag=True, help="Run the other programs that are installed beside ours."),
        click.option(
            "--only",
            callback=parse_only,
            metavar="NAME[,NAME...]",
            help="Of tinystories, torch, transformers, ctranslate2, llama.cpp; each perhaps with :PRECISION.",
        ),
        click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds that count."),
        click.option("--threads", type=click.IntRange(min=1), help="Of each program.  [default: the cores]"),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """What all benches have, and what random weights are made of where no MODEL is named."""
    preset = f"Random weights of this preset or TOML file: {', '.join(PRESETS)}.  [default: {DEFAULT_PRESET}]"
    size = click.IntRange(min=2)
    command = click.option("--vocab", type=size, default=50257, show_default=True, help="Ids of the random model.")(
        command
    )
    return common_options(click.option("--preset", help=preset)(command))


@bench.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.option("--tokens", type=click.IntRange(min=2), default=200, show_default=True, help="To write, greedily.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="To read (prefill).")
@click.option(
    "--shortlist",
    type=click.IntRange(min=2),
    metavar="N",
    help="Also run ours with logits of N ids alone, as `generate --shortlist` (here the first N).",
)
def decode(tokens: int, prompt_tokens: int, shortlist: int | None, **options: Any) -> None:
    """One stream: how fast a prompt is read, and how fast tokens are written after 8 others."""
    with open_session(options, streams=1, capacity=max(tokens + 8, prompt_tokens), shortlist=shortlist or 0) as session:
        prefill_result = session.measure("prefill", [session.random_prompt(prompt_tokens)], 1, prompt_tokens)
        decode_result = session.measure("decode", [session.random_prompt(8)], tokens, tokens)
        session.print_summary(prefill_result | decode_result, prompt_tokens=prompt_tokens, tokens=tokens)


@bench.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.option("--streams", type=click.IntRange(min=1), default=32, show_default=True, help="Written at once.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="To write in each stream.")
def batch(streams: int, tokens: int, **options: Any) -> None:
    """Many streams at once, each after 8 tokens of its own; tokens of all streams count."""
    with open_session(options, streams=streams, capacity=tokens + 8) as session:
        prompts = [session.random_prompt(8) for _ in range(streams)]
        session.print_summary(
            session.measure("batch", prompts, tokens, tokens * streams), streams=streams, tokens=tokens
        )


@bench.command(context_settings=CONTEXT_SETTINGS)
@common_options
def startup(
    model: Path | None, peers: bool, only: list[Competitor], runs: int, threads: int | None, as_json: bool
) -> None:
    """Whole processes from their start to their end, with one token written: `tinystories generate` against others.

    MODEL must be given here. Ours reads a text and writes one; the others are only given the ids.
    """
    if model is None:
        raise UserError("bench startup needs a MODEL: a directory that `tinystories train` made")
    from rich.table import Table

    from tinystories.checkpoint import read_model

    files = read_model(model)
    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name:
        folder = Path(name)
        link_weights(files.weights_path, folder)
        selected = prepare_competitors(folder, files.config, peers, only)
        commands = {
            format_label(*competitor): startup_command(competitor, model, folder, threads) for competitor in selected
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(runs + 1):
            print_progress(f"round {i} of {runs}" if i else "warming up")
            for name, (command, stdin) in commands.items():
                started_at = time.perf_counter()
                completed = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
                if completed.returncode:
                    raise UserError(
                        f"{name} stopped: {(completed.stderr.strip().splitlines() or ['no reason given'])[-1]}"
                    )
                if i:
                    seconds[name].append(time.perf_counter() - started_at)
        medians = {name: statistics.median(timings) for name, timings in seconds.items()}
        table = Table("whole process, one token", "seconds", "min", "max", "over the first")
        baseline = next(iter(seconds.values()))
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(taken, baseline, strict=True))
            table.add_row(name, *(f"{x:.2f}" for x in (medians[name], min(taken), max(taken), ratio)))
        print_table(table)
        if as_json:
            click.echo(
                json.dumps({"benchmark": "startup", "seconds": medians, "runs": seconds, **describe_machine(selected)})
            )


def startup_command(competitor: Competitor, model: Path, folder: Path, threads: int | None) -> tuple[list[str], str]:
    """Command and input of a process that writes one token."""
    name, precision = competitor
    if name in ("tinystories", "torch"):
        command = [sys.executable, "-m", "tinystories", "generate", str(model), "--max-tokens", "1", "--precision"]
        command += [precision, "--engine", "torch" if name == "torch" else "cpu", "--prompt", "Once"]
        return command + (["--threads", str(threads)] if threads and name == "tinystories" else []), ""
    from tinystories.interop.bench_competitors import Workload

    workload = json.dumps(dataclasses.asdict(Workload(threads=threads or count_cores(), streams=1, tokens=16)))
    request = json.dumps({"prompts": [[1]], "tokens": 1}) + "\n"
    return [
        sys.executable,
        "-m",
        "tinystories.interop.bench_competitors",
        name,
        precision,
        str(folder),
        workload,
    ], request


@contextlib.contextmanager
def open_session(
    options: dict[str, Any], *, streams: int, capacity: int, shortlist: int = 0
) -> Iterator["BenchSession"]:
    """The contestants over MODEL or random weights, ready in their processes; ended with the block.

    With `shortlist` ours takes part a second time, with a head of so many rows.
    """
    from tinystories.interop.bench_competitors import Workload
    from tinystories.interop.bench_runner import BenchProcess

    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name:
        folder = Path(name)
        config = prepare_weights(folder, options)
        if capacity > config.n_ctx:
            raise UserError(f"{capacity} tokens do not fit the model's context of {config.n_ctx}; ask for fewer")
        if shortlist >= config.vocab_size:
            raise UserError(f"a shortlist of {shortlist:,} ids is not shorter than the vocabulary")
        selected = prepare_competitors(folder, config, options["peers"], options["only"])
        if shortlist and all(name != "tinystories" for name, _ in selected):
            raise UserError("--shortlist is of tinystories, which --only leaves out")
        workload = Workload(threads=options["threads"] or count_cores(), streams=streams, tokens=capacity)
        with contextlib.ExitStack() as stack:
            processes = []
            for competitor in selected:
                print_progress(f"starting {format_label(*competitor)}")
                for shortlist_size in (0, shortlist) if shortlist and competitor[0] == "tinystories" else (0,):
                    processes.append(
                        BenchProcess(*competitor, folder, dataclasses.replace(workload, shortlist=shortlist_size))
                    )
                    stack.callback(processes[-1].close)
            yield BenchSession(config, processes, options, workload.threads)


def prepare_weights(folder: Path, options: dict[str, Any]) -> ModelConfig:
    """Puts weights into the folder: MODEL's, or random ones of a preset."""
    model, preset = options["model"], options["preset"]
    if model is not None:
        if preset:
            raise UserError("name either MODEL or --preset")
        from tinystories.checkpoint import read_model

        files = read_model(model)
        link_weights(files.weights_path, folder)
        return files.config
    from tinystories.interop.bench_competitors import WEIGHTS_FILE
    from tinystories.interop.random_weights import write_random_weights

    preset_config = load_config(preset or DEFAULT_PRESET).model
    config = dataclasses.replace(preset_config, vocab_size=options["vocab"], dropout=0.0)
    print_progress(f"random weights of {preset or DEFAULT_PRESET}: {config.n_params:,} parameters")
    write_random_weights(config, folder / WEIGHTS_FILE)
    return config


def link_weights(weights: Path, folder: Path) -> None:
    from tinystories.interop.bench_competitors import WEIGHTS_FILE

    (folder / WEIGHTS_FILE).symlink_to(weights.resolve())


def prepare_competitors(folder: Path, config: ModelConfig, peers: bool, only: list[Competitor]) -> list[Competitor]:
    """(name, precision) of all that take part, their files made."""
    from tinystories.interop import bench_competitors as programs

    programs.write_shape_file(folder, config)
    candidates = only or [(n, p) for n in programs.PRECISIONS for p in programs.PRECISIONS[n]]
    selected = [competitor for competitor in candidates if only or peers or competitor[0] == "tinystories"]
    for name in dict.fromkeys(name for name, _ in selected):
        if reason := programs.unavailable_reason(name, config):
            if only:
                raise UserError(f"{name} {reason}")
            print_progress(f"without {name}: it {reason}")
            selected = [who for who in selected if who[0] != name]
    for name, precision in selected:
        print_progress(f"making the files of {format_label(name, precision)}")
        programs.prepare_files(folder, name, precision)
    return selected


def format_label(name: str, precision: str) -> str:
    return f"{name} {precision}"


class BenchSession:
    """What the commands do with contestants that are ready."""

    def __init__(self, config: ModelConfig, processes: Sequence[Any], options: dict[str, Any], threads: int) -> None:
        import numpy as np

        self.config, self.processes, self.options, self.threads = config, processes, options, threads
        self.rng = np.random.default_rng(0)

    def random_prompt(self, n: int) -> list[int]:
        ids: list[int] = self.rng.integers(self.config.vocab_size, size=n).tolist()
        return ids

    def measure(self, task: str, prompts: list[list[int]], tokens: int, counted_tokens: int) -> dict[str, Any]:
        """Runs and shows one task; what the JSON says of it, under the task's name."""
        from rich.table import Table

        from tinystories.interop.bench_runner import matching_prefix, run_rounds, speed_ratios

        measurements = run_rounds(
            self.processes,
            prompts,
            tokens,
            self.options["runs"],
            counted_tokens=counted_tokens,
            report=lambda text: print_progress(f"{task}: {text}"),
        )
        table = Table(task, "tokens/s", "min", "max", "peak MB", "same ids")
        for column in table.columns[1:]:
            column.justify = "right"
        matching = {}
        for measurement in measurements:
            matching[measurement.label] = matching_prefix(measurement, measurements[0]) / (tokens * len(prompts))
            peak = f"{measurement.peak_mb:,.0f}" if measurement.peak_mb else "?"
            rates = (f"{rate:,.1f}" for rate in (measurement.median, min(measurement.rates), max(measurement.rates)))
            table.add_row(measurement.label, *rates, peak, f"{matching[measurement.label]:.0%}")
        print_table(table)
        ratios = speed_ratios(measurements)
        for name, ratio in ratios.items():
            click.echo(f"  {name}: {ratio:.2f}")
        medians = {s.label: round(s.median, 2) for s in measurements}
        runs = {s.label: [round(rate, 2) for rate in s.rates] for s in measurements}
        peaks = {s.label: s.peak_mb for s in measurements}
        ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
        result = {"tokens_per_s": medians, "ratios": ratios, "peak_mb": peaks, "same_ids": matching, "runs": runs}
        return {task: result}

    def print_summary(self, results: dict[str, Any], **task: int) -> None:
        click.echo('"same ids": up to the first that differs from the first row\'s; the likeliest id each time')
        if self.options["as_json"]:
            competitors = [(c.name, c.precision) for c in self.processes]
            model = str(self.options["model"] or self.options["preset"] or DEFAULT_PRESET)
            facts = {"model": model, "parameters": self.config.n_params, "threads": self.threads, **task}
            click.echo(
                json.dumps(
                    {
                        "benchmark": click.get_current_context().info_name,
                        **facts,
                        **results,
                        **describe_machine(competitors),
                    }
                )
            )


def describe_machine(competitors: Sequence[Competitor]) -> dict[str, Any]:
    """What the numbers belong to."""
    import platform

    from tinystories.interop.bench_competitors import package_version

    versions = {name: package_version(name) for name in dict.fromkeys(name for name, _ in competitors)}
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": count_cores(),
    }


def count_cores() -> int:
    from tinystories.engine.cpu.thread_pool import count_physical_cores

    return count_physical_cores()


def print_table(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def print_progress(text: str) -> None:
    click.echo(text, err=True)
