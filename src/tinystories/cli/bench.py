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

from tinystories.cli.command import SETTINGS, json_option
from tinystories.config import PRESETS, ModelConfig, load_config
from tinystories.errors import UserError

DEFAULT_PRESET = "modern-89m"
Who: TypeAlias = tuple[str, str]  # name and precision


@click.group(context_settings=SETTINGS)
def bench() -> None:
    """Measure speed: one stream, many streams, or the start of a process.

    With --peers every program that is installed (llama.cpp by llama-cpp-python, CTranslate2, Hugging Face
    transformers, the torch engine) gets the same weights and takes turns with ours, each in a process of its own.
    """


def wanted_by(_context: click.Context, _option: click.Parameter, only: str | None) -> list[Who]:
    """(name, precision) of each part of --only; none where it was not given."""
    from tinystories.interop.peers import PRECISIONS

    wanted: list[Who] = []
    for part in only.split(",") if only else ():
        name, _, precision = part.strip().partition(":")
        if name not in PRECISIONS or (precision and precision not in PRECISIONS[name]):
            every = ", ".join(f"{n} ({', '.join(p)})" for n, p in PRECISIONS.items())
            raise UserError(f"--only {part.strip()}: there is no such program or precision; use {every}")
        wanted += [(name, precision)] if precision else [(name, p) for p in PRECISIONS[name]]
    return wanted


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Arguments that all benches have."""
    options = [
        click.argument("model", type=click.Path(path_type=Path), required=False),
        click.option("--peers", is_flag=True, help="Run the other programs that are installed beside ours."),
        click.option(
            "--only",
            callback=wanted_by,
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


def model_or_random(command: Callable[..., None]) -> Callable[..., None]:
    """What all benches have, and what random weights are made of where no MODEL is named."""
    preset = f"Random weights of this preset or TOML file: {', '.join(PRESETS)}.  [default: {DEFAULT_PRESET}]"
    size = click.IntRange(min=2)
    command = click.option("--vocab", type=size, default=50257, show_default=True, help="Ids of the random model.")(
        command
    )
    return shared(click.option("--preset", help=preset)(command))


@bench.command(context_settings=SETTINGS)
@model_or_random
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
    with contest(options, streams=1, room=max(tokens + 8, prompt_tokens), shortlist=shortlist or 0) as turn:
        read = turn.measure("prefill", [turn.prompt(prompt_tokens)], 1, prompt_tokens)
        write = turn.measure("decode", [turn.prompt(8)], tokens, tokens)
        turn.finish(read | write, prompt_tokens=prompt_tokens, tokens=tokens)


@bench.command(context_settings=SETTINGS)
@model_or_random
@click.option("--streams", type=click.IntRange(min=1), default=32, show_default=True, help="Written at once.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="To write in each stream.")
def batch(streams: int, tokens: int, **options: Any) -> None:
    """Many streams at once, each after 8 tokens of its own; tokens of all streams count."""
    with contest(options, streams=streams, room=tokens + 8) as turn:
        prompts = [turn.prompt(8) for _ in range(streams)]
        turn.finish(turn.measure("batch", prompts, tokens, tokens * streams), streams=streams, tokens=tokens)


@bench.command(context_settings=SETTINGS)
@shared
def startup(model: Path | None, peers: bool, only: list[Who], runs: int, threads: int | None, as_json: bool) -> None:
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
        chosen = ready(folder, files.config, peers, only)
        commands = {label(*who): process_of(who, model, folder, threads) for who in chosen}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(runs + 1):
            tell(f"round {i} of {runs}" if i else "warming up")
            for name, (command, stdin) in commands.items():
                began = time.perf_counter()
                done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise UserError(f"{name} stopped: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
                if i:
                    seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        table = Table("whole process, one token", "seconds", "min", "max", "over the first")
        first = next(iter(seconds.values()))
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(taken, first, strict=True))
            table.add_row(name, *(f"{x:.2f}" for x in (medians[name], min(taken), max(taken), ratio)))
        show(table)
        if as_json:
            click.echo(json.dumps({"benchmark": "startup", "seconds": medians, "runs": seconds, **machine(chosen)}))


def process_of(who: Who, model: Path, folder: Path, threads: int | None) -> tuple[list[str], str]:
    """Command and input of a process that writes one token."""
    name, precision = who
    if name in ("tinystories", "torch"):
        command = [sys.executable, "-m", "tinystories", "generate", str(model), "--max-tokens", "1", "--precision"]
        command += [precision, "--engine", "torch" if name == "torch" else "cpu", "--prompt", "Once"]
        return command + (["--threads", str(threads)] if threads and name == "tinystories" else []), ""
    from tinystories.interop.peers import Room

    room = json.dumps(dataclasses.asdict(Room(threads=threads or cores(), streams=1, tokens=16)))
    request = json.dumps({"prompts": [[1]], "tokens": 1}) + "\n"
    return [sys.executable, "-m", "tinystories.interop.peers", name, precision, str(folder), room], request


@contextlib.contextmanager
def contest(options: dict[str, Any], *, streams: int, room: int, shortlist: int = 0) -> Iterator["Contest"]:
    """The contestants over MODEL or random weights, ready in their processes; ended with the block.

    With `shortlist` ours takes part a second time, with a head of so many rows.
    """
    from tinystories.interop.contest import Contestant
    from tinystories.interop.peers import Room

    with tempfile.TemporaryDirectory(prefix="tinystories-bench-") as name:
        folder = Path(name)
        config = weights_for(folder, options)
        if room > config.n_ctx:
            raise UserError(f"{room} tokens do not fit the model's context of {config.n_ctx}; ask for fewer")
        if shortlist >= config.vocab_size:
            raise UserError(f"a shortlist of {shortlist:,} ids is not shorter than the vocabulary")
        chosen = ready(folder, config, options["peers"], options["only"])
        if shortlist and all(name != "tinystories" for name, _ in chosen):
            raise UserError("--shortlist is of tinystories, which --only leaves out")
        place = Room(threads=options["threads"] or cores(), streams=streams, tokens=room)
        with contextlib.ExitStack() as stack:
            contestants = []
            for who in chosen:
                tell(f"starting {label(*who)}")
                for rows in (0, shortlist) if shortlist and who[0] == "tinystories" else (0,):
                    contestants.append(Contestant(*who, folder, dataclasses.replace(place, shortlist=rows)))
                    stack.callback(contestants[-1].close)
            yield Contest(config, contestants, options, place.threads)


def weights_for(folder: Path, options: dict[str, Any]) -> ModelConfig:
    """Puts weights into the folder: MODEL's, or random ones of a preset."""
    model, preset = options["model"], options["preset"]
    if model is not None:
        if preset:
            raise UserError("name either MODEL or --preset")
        from tinystories.checkpoint import read_model

        files = read_model(model)
        link_weights(files.weights_path, folder)
        return files.config
    from tinystories.interop.peers import WEIGHTS
    from tinystories.interop.random_weights import save_random

    shape = load_config(preset or DEFAULT_PRESET).model
    config = dataclasses.replace(shape, vocab_size=options["vocab"], dropout=0.0)
    tell(f"random weights of {preset or DEFAULT_PRESET}: {config.n_params:,} parameters")
    save_random(config, folder / WEIGHTS)
    return config


def link_weights(weights: Path, folder: Path) -> None:
    from tinystories.interop.peers import WEIGHTS

    (folder / WEIGHTS).symlink_to(weights.resolve())


def ready(folder: Path, config: ModelConfig, peers: bool, only: list[Who]) -> list[Who]:
    """(name, precision) of all that take part, their files made."""
    from tinystories.interop import peers as programs

    programs.describe(folder, config)
    wanted = only or [(n, p) for n in programs.PRECISIONS for p in programs.PRECISIONS[n]]
    chosen = [who for who in wanted if only or peers or who[0] == "tinystories"]
    for name in dict.fromkeys(name for name, _ in chosen):
        if reason := programs.why_not(name, config):
            if only:
                raise UserError(f"{name} {reason}")
            tell(f"without {name}: it {reason}")
            chosen = [who for who in chosen if who[0] != name]
    for name, precision in chosen:
        tell(f"making the files of {label(name, precision)}")
        programs.build(folder, name, precision)
    return chosen


def label(name: str, precision: str) -> str:
    return f"{name} {precision}"


class Contest:
    """What the commands do with contestants that are ready."""

    def __init__(self, config: ModelConfig, contestants: Sequence[Any], options: dict[str, Any], threads: int) -> None:
        import numpy as np

        self.config, self.contestants, self.options, self.threads = config, contestants, options, threads
        self.random = np.random.default_rng(0)

    def prompt(self, n: int) -> list[int]:
        ids: list[int] = self.random.integers(self.config.vocab_size, size=n).tolist()
        return ids

    def measure(self, task: str, prompts: list[list[int]], tokens: int, counted: int) -> dict[str, Any]:
        """Runs and shows one task; what the JSON says of it, under the task's name."""
        from rich.table import Table

        from tinystories.interop.contest import agreement, pairs, rounds

        scores = rounds(
            self.contestants,
            prompts,
            tokens,
            self.options["runs"],
            counted=counted,
            tell=lambda text: tell(f"{task}: {text}"),
        )
        table = Table(task, "tokens/s", "min", "max", "peak MB", "same ids")
        for column in table.columns[1:]:
            column.justify = "right"
        same = {}
        for score in scores:
            same[score.label] = agreement(score, scores[0]) / (tokens * len(prompts))
            peak = f"{score.peak_mb:,.0f}" if score.peak_mb else "?"
            rates = (f"{rate:,.1f}" for rate in (score.median, min(score.rates), max(score.rates)))
            table.add_row(score.label, *rates, peak, f"{same[score.label]:.0%}")
        show(table)
        ratios = pairs(scores)
        for name, ratio in ratios.items():
            click.echo(f"  {name}: {ratio:.2f}")
        medians = {s.label: round(s.median, 2) for s in scores}
        runs = {s.label: [round(rate, 2) for rate in s.rates] for s in scores}
        peaks = {s.label: s.peak_mb for s in scores}
        ratios = {name: round(ratio, 3) for name, ratio in ratios.items()}
        found = {"tokens_per_s": medians, "ratios": ratios, "peak_mb": peaks, "same_ids": same, "runs": runs}
        return {task: found}

    def finish(self, found: dict[str, Any], **task: int) -> None:
        click.echo('"same ids": up to the first that differs from the first row\'s; the likeliest id each time')
        if self.options["as_json"]:
            who = [(c.name, c.precision) for c in self.contestants]
            model = str(self.options["model"] or self.options["preset"] or DEFAULT_PRESET)
            facts = {"model": model, "parameters": self.config.n_params, "threads": self.threads, **task}
            click.echo(
                json.dumps({"benchmark": click.get_current_context().info_name, **facts, **found, **machine(who)})
            )


def machine(who: Sequence[Who]) -> dict[str, Any]:
    """What the numbers belong to."""
    import platform

    from tinystories.interop.peers import version

    versions = {name: version(name) for name in dict.fromkeys(name for name, _ in who)}
    return {"versions": versions, "python": platform.python_version(), "machine": platform.machine(), "cores": cores()}


def cores() -> int:
    from tinystories.engine.cpu.team import physical_cores

    return physical_cores()


def show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def tell(text: str) -> None:
    click.echo(text, err=True)
