"""`tinystories bench`: generation speed on this machine, also compared with other programs on the same weights."""

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
from tinystories.config import ModelConfig
from tinystories.config_file import PRESETS, load_config
from tinystories.errors import UserError

DEFAULT_PRESET = "modern-89m"
Competitor: TypeAlias = tuple[str, str]  # name and precision


@click.group(context_settings=CONTEXT_SETTINGS)
def bench() -> None:
    """Measure speed: one stream, many streams, or process startup.

    With --peers, every installed program (llama.cpp via llama-cpp-python, CTranslate2, Hugging Face transformers, the
    torch engine) gets the same weights and takes turns with tinystories, each in its own process.
    """


def parse_only(_context: click.Context, _option: click.Parameter, only: str | None) -> list[Competitor]:
    """Parse --only into (name, precision) pairs; empty if it was not given. A name alone means all its precisions."""
    from tinystories.bench.competitors import PRECISIONS

    selected: list[Competitor] = []
    for part in only.split(",") if only else ():
        name, _, precision = part.strip().partition(":")
        if name not in PRECISIONS or (precision and precision not in PRECISIONS[name]):
            available = ", ".join(f"{n} ({', '.join(p)})" for n, p in PRECISIONS.items())
            raise UserError(f"--only {part.strip()}: unknown program or precision; available: {available}")
        selected += [(name, precision)] if precision else [(name, p) for p in PRECISIONS[name]]
    return selected


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments that all benchmarks share."""
    options = [
        click.argument("model", type=click.Path(path_type=Path), required=False),
        click.option("--peers", is_flag=True, help="Also run every other program that is installed."),
        click.option(
            "--only",
            callback=parse_only,
            metavar="NAME[,NAME...]",
            help="Run only these: tinystories, torch, transformers, ctranslate2, llama.cpp; NAME or NAME:PRECISION.",
        ),
        click.option(
            "--runs",
            type=click.IntRange(min=1),
            default=5,
            show_default=True,
            help="Measured rounds (after a warm-up).",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Threads of each program.  [default: number of cores]"
        ),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared arguments, and those that describe random weights for when no MODEL is given."""
    preset = f"Random weights of this preset or TOML file: {', '.join(PRESETS)}.  [default: {DEFAULT_PRESET}]"
    size = click.IntRange(min=2)
    command = click.option(
        "--vocab", type=size, default=50257, show_default=True, help="Vocabulary size of the random model."
    )(command)
    return common_options(click.option("--preset", help=preset)(command))


@bench.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.option(
    "--tokens", type=click.IntRange(min=2), default=200, show_default=True, help="Tokens to generate, greedily."
)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Prompt length for prefill."
)
@click.option(
    "--shortlist",
    type=click.IntRange(min=2),
    metavar="N",
    help="Also run tinystories with the logits of only N ids, as in `generate --shortlist` (here the first N).",
)
def decode(tokens: int, prompt_tokens: int, shortlist: int | None, **options: Any) -> None:
    """Benchmark one stream: prefill of a prompt, and decode after a prompt of 8 tokens."""
    with open_session(options, streams=1, capacity=max(tokens + 8, prompt_tokens), shortlist=shortlist or 0) as session:
        prefill_result = session.measure("prefill", [session.random_prompt(prompt_tokens)], 1, prompt_tokens)
        decode_result = session.measure("decode", [session.random_prompt(8)], tokens, tokens)
        session.print_summary(prefill_result | decode_result, prompt_tokens=prompt_tokens, tokens=tokens)


@bench.command(context_settings=CONTEXT_SETTINGS)
@model_options
@click.option(
    "--streams", type=click.IntRange(min=1), default=32, show_default=True, help="Streams to generate at once."
)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to generate per stream."
)
def batch(streams: int, tokens: int, **options: Any) -> None:
    """Benchmark many streams at once, each after its own prompt of 8 tokens; the rate counts all streams."""
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
    """Benchmark whole processes that generate one token: `tinystories generate` and others.

    MODEL is required. tinystories tokenizes a prompt and prints text; the other programs only handle token ids.
    """
    if model is None:
        raise UserError("bench startup requires MODEL: a directory written by `tinystories train`")
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
                        f"{name} stopped: {(completed.stderr.strip().splitlines() or ['no error message'])[-1]}"
                    )
                if i:
                    seconds[name].append(time.perf_counter() - started_at)
        medians = {name: statistics.median(timings) for name, timings in seconds.items()}
        table = Table("whole process, one token", "seconds", "min", "max", "vs. first")
        baseline = next(iter(seconds.values()))
        for name, timings in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(timings, baseline, strict=True))
            table.add_row(name, *(f"{x:.2f}" for x in (medians[name], min(timings), max(timings), ratio)))
        print_table(table)
        if as_json:
            click.echo(
                json.dumps({"benchmark": "startup", "seconds": medians, "runs": seconds, **describe_machine(selected)})
            )


def startup_command(competitor: Competitor, model: Path, folder: Path, threads: int | None) -> tuple[list[str], str]:
    """Return the command line and the stdin text of a process that generates one token."""
    name, precision = competitor
    if name in ("tinystories", "torch"):
        command = [sys.executable, "-m", "tinystories", "generate", str(model), "--max-tokens", "1", "--precision"]
        command += [precision, "--engine", "torch" if name == "torch" else "cpu", "--prompt", "Once"]
        return command + (["--threads", str(threads)] if threads and name == "tinystories" else []), ""
    from tinystories.bench.competitors import Workload

    workload = json.dumps(dataclasses.asdict(Workload(threads=threads or count_cores(), streams=1, tokens=16)))
    request = json.dumps({"prompts": [[1]], "tokens": 1}) + "\n"
    return [
        sys.executable,
        "-m",
        "tinystories.bench.competitors",
        name,
        precision,
        str(folder),
        workload,
    ], request


@contextlib.contextmanager
def open_session(
    options: dict[str, Any], *, streams: int, capacity: int, shortlist: int = 0
) -> Iterator["BenchSession"]:
    """Start one process per competitor, with MODEL or random weights; all processes end with the block.

    With `shortlist`, tinystories takes part a second time, with an output head of only that many ids. `capacity` is
    the number of tokens that each stream must hold. `UserError` if the options do not fit the model.
    """
    from tinystories.bench.competitors import Workload
    from tinystories.bench.runner import BenchProcess

    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name:
        folder = Path(name)
        config = prepare_weights(folder, options)
        if capacity > config.n_ctx:
            raise UserError(
                f"{capacity} tokens exceed the model's context of {config.n_ctx}; lower --tokens or --prompt-tokens"
            )
        if shortlist >= config.vocab_size:
            raise UserError(f"--shortlist {shortlist:,} must be below the vocabulary size, {config.vocab_size:,}")
        selected = prepare_competitors(folder, config, options["peers"], options["only"])
        if shortlist and all(name != "tinystories" for name, _ in selected):
            raise UserError("--shortlist applies to tinystories, which --only leaves out")
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
    """Put the weights into `folder` (a link to MODEL's, or random ones of a preset) and return their config."""
    model, preset = options["model"], options["preset"]
    if model is not None:
        if preset:
            raise UserError("give either MODEL or --preset, not both")
        from tinystories.checkpoint import read_model

        files = read_model(model)
        link_weights(files.weights_path, folder)
        return files.config
    from tinystories.bench.competitors import WEIGHTS_FILE
    from tinystories.bench.random_weights import write_random_weights

    preset_config = load_config(preset or DEFAULT_PRESET).model
    config = dataclasses.replace(preset_config, vocab_size=options["vocab"], dropout=0.0)
    print_progress(f"random weights of {preset or DEFAULT_PRESET}: {config.n_params:,} parameters")
    write_random_weights(config, folder / WEIGHTS_FILE)
    return config


def link_weights(weights: Path, folder: Path) -> None:
    """Symlink the weights into `folder`, under the name that the competitors read."""
    from tinystories.bench.competitors import WEIGHTS_FILE

    (folder / WEIGHTS_FILE).symlink_to(weights.resolve())


def prepare_competitors(folder: Path, config: ModelConfig, peers: bool, only: list[Competitor]) -> list[Competitor]:
    """Write the files of all programs that take part, and return these as (name, precision).

    A program that cannot run is skipped with a note; if --only names it, it is a `UserError`.
    """
    from tinystories.bench import competitors as programs

    programs.write_shape_file(folder, config)
    candidates = only or [(n, p) for n in programs.PRECISIONS for p in programs.PRECISIONS[n]]
    selected = [competitor for competitor in candidates if only or peers or competitor[0] == "tinystories"]
    for name in dict.fromkeys(name for name, _ in selected):
        if reason := programs.unavailable_reason(name, config):
            if only:
                raise UserError(f"{name} {reason}")
            print_progress(f"skipping {name}: it {reason}")
            selected = [who for who in selected if who[0] != name]
    for name, precision in selected:
        print_progress(f"preparing the files of {format_label(name, precision)}")
        programs.prepare_files(folder, name, precision)
    return selected


def format_label(name: str, precision: str) -> str:
    return f"{name} {precision}"


class BenchSession:
    """Running processes of all competitors, and the measurements that the commands take with them."""

    def __init__(self, config: ModelConfig, processes: Sequence[Any], options: dict[str, Any], threads: int) -> None:
        import numpy as np

        self.config, self.processes, self.options, self.threads = config, processes, options, threads
        self.rng = np.random.default_rng(0)

    def random_prompt(self, n: int) -> list[int]:
        """Return n random ids, the same ones in each run of the program."""
        ids: list[int] = self.rng.integers(self.config.vocab_size, size=n).tolist()
        return ids

    def measure(self, task: str, prompts: list[list[int]], tokens: int, counted_tokens: int) -> dict[str, Any]:
        """Run one task in all processes and print its table; return its results for the JSON as {task: results}.

        `tokens` are generated per prompt; `counted_tokens` of one run, divided by its seconds, are the tokens/s.
        """
        from rich.table import Table

        from tinystories.bench.runner import matching_prefix, run_rounds, speed_ratios

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
        """Explain the table and, with --json, print everything that was measured."""
        click.echo('"same ids": share of the greedy ids before the first that differs from the first row')
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
    """Return what the measurements depend on: versions of all programs, Python, machine and cores."""
    import platform

    from tinystories.bench.competitors import package_version

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
