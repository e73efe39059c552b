"""The command line: arguments to settings to one function call. The only place that prints and that catches UserError.

Heavy imports (torch above all) happen inside the commands, so that `--help` answers at once.
"""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from tinystories.config import PRESETS, Config, load_config
from tinystories.errors import UserError

if TYPE_CHECKING:
    from tinystories.data.prepare import PrepareReport

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
TRAIN_EXTRA = 'this command needs more packages; install them with: pip install "tinystories-gpt[train]"'


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `tinystories` command: exits 0 done, 1 failed, 2 the user's mistake, 128+n signal n."""
    sys.exit(run(cli, argv))


def run(command: click.Command, argv: list[str] | None = None, name: str = "tinystories") -> int:
    """Run a command and turn what people can mend into one line on stderr; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        result = command.main(argv, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()} (see {name} --help)", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        click.echo(f"error: {error.name} is not installed; {TRAIN_EXTRA}", err=True)
        return 2


@click.group(context_settings=SETTINGS)
@click.version_option(package_name="tinystories-gpt")
def cli() -> None:
    """Train a small storyteller from scratch and read its stories.

    \b
    Start here (about a minute each, no network):
      tinystories prepare sample --tokenizer bpe:1024 --out data/sample
      tinystories train --config nano --data data/sample --out runs/first --train.steps 200
      tinystories generate runs/first --prompt "Once upon a time"

    Every command explains itself: tinystories COMMAND --help
    """


@cli.command()
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; made whole or not at all."
)
@click.option(
    "--val", multiple=True, help="Validation source. Without it: the source's own, else 0.5 % held out by hash."
)
@click.option(
    "--tokenizer", default="gpt2", show_default=True, help="gpt2, bpe:N (trained on SOURCE) or a tokenizer.json."
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of JSONL, CSV, parquet and Hub sources."
)
@click.option(
    "--errors",
    type=click.Choice(["strict", "replace"]),
    default="strict",
    show_default=True,
    help="What to do with bytes that are not UTF-8: stop, or put U+FFFD in their place.",
)
@click.option("--keep-duplicates", is_flag=True, help="Keep stories that occur more than once.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object last.")
def prepare(
    source: tuple[str, ...],
    out: Path,
    val: tuple[str, ...],
    tokenizer: str,
    text_field: str,
    errors: Any,
    keep_duplicates: bool,
    as_json: bool,
) -> None:
    """Turn stories into token files to train on.

    \b
    SOURCE is one of
      sample              172 stories that come with the package
      tinystories         roneneldan/TinyStories (2.1M stories, 1.9 GB, downloaded)
      tinystories-v2      the GPT-4 stories of the same set
      tinystories-clean   karpathy/tinystories-gpt4-clean
      hf:OWNER/NAME       any set of the Hugging Face Hub
      FILE or FOLDER ...  .txt (<|endoftext|> between stories), .jsonl, .csv, .parquet

    Interrupted, it goes on where it stopped; run twice, it has nothing to do.
    """
    from tinystories.data.prepare import prepare as prepare_data

    report = prepare_data(
        list(source),
        out,
        val=list(val) or None,
        tokenizer=tokenizer,
        text_field=text_field,
        errors=errors,
        keep_duplicates=keep_duplicates,
    )
    print_prepared(report)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), default=str))


def print_prepared(report: "PrepareReport") -> None:
    meta = report.meta
    for name, split in meta.splits.items():
        click.echo(
            f"{name:5}  {split.stories:>10,} stories  {split.tokens:>12,} tokens  {split.bytes / 1e6:>8.1f} MB of text"
        )
    dropped = [f"{meta.duplicates:,} duplicates", f"{meta.also_in_val:,} also in val", f"{meta.empty:,} empty"]
    click.echo(f"dropped: {', '.join(dropped)}; vocabulary: {meta.vocab_size:,} ids ({meta.tokenizer})")
    if report.up_to_date:
        click.echo(f"{report.out} is up to date: nothing to do")
    else:
        click.echo(f"wrote {report.out} in {report.seconds:.1f} s ({report.mb_per_s:.1f} MB/s)")


class SettingsCommand(click.Command):
    """A command whose help also lists every `--section.key` setting with its default."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        defaults = Config()
        for section in get_type_hints(Config):
            rows = []
            for field in dataclasses.fields(getattr(defaults, section)):
                value = getattr(getattr(defaults, section), field.name)
                rows.append(
                    (f"--{section}.{field.name}", " | ".join(value) if isinstance(value, tuple) else str(value))
                )
            with formatter.section(f"Settings of [{section}] and their defaults"):
                formatter.write_dl(rows)


@cli.command(
    cls=SettingsCommand, context_settings=SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option(
    "--config", "config_file", default="nano", show_default=True, help=f"TOML file, or a preset: {', '.join(PRESETS)}."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder made by `tinystories prepare`.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/NAME of the config]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@click.option("--print-config", is_flag=True, help="Print the resolved settings as TOML and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object last.")
@click.pass_context
def train(
    context: click.Context,
    config_file: str,
    data: Path | None,
    out: Path | None,
    resume: bool,
    print_config: bool,
    as_json: bool,
) -> int:
    """Train a model. Settings come from --config, and over it any --SECTION.KEY VALUE below.

    \b
    Ctrl-C saves a checkpoint and says how to go on. The run directory is a model:
      tinystories generate runs/nano          read its stories
      tinystories eval runs/nano --data FILE  measure it
    It also holds loss.png, samples.md, metrics.jsonl and config.toml.
    """
    out = out or Path("runs") / Path(config_file).stem
    overrides = dotted_overrides(context.args)
    saved = out / "config.toml"
    given = context.get_parameter_source("config_file") is not click.core.ParameterSource.DEFAULT
    source = saved if resume and not given and saved.exists() else config_file
    config = load_config(source, overrides | ({"data.dir": str(data)} if data else {}))
    if print_config:
        from tinystories.config import to_toml

        click.echo(to_toml(config), nl=False)
        return 0
    if data is None:
        ensure_prepared(config)
    return train_run(config, out, resume=resume, as_json=as_json)


def train_run(config: Config, out: Path, *, resume: bool, as_json: bool = False) -> int:
    """Train and say what to do next; returns the exit code."""
    from tinystories.train.loop import Interrupted, train

    try:
        report = train(config, out, resume=resume)
    except Interrupted as stop:
        click.echo(f"{stop}; saved. Go on with: tinystories train --out {out} --resume", err=True)
        return 128 + stop.signal
    if report is not None:
        click.echo(f"{report.bits_per_byte:.4f} bits per byte on {report.stories:,} validation stories", err=True)
    click.echo(f"done: {out} (loss.png, samples.md). Read a story: tinystories generate {out}", err=True)
    if as_json:
        score = dataclasses.asdict(report) if report is not None else {}
        click.echo(json.dumps({"out": str(out), "steps": config.train.steps} | score))
    return 0


def ensure_prepared(config: Config) -> None:
    """Prepare the data that a config names, where it is not there yet."""
    folder = Path(config.data.dir)
    if (folder / "meta.json").exists():
        return
    from tinystories.data.prepare import prepare as prepare_data

    click.echo(f"{folder} is not there yet: preparing {config.data.source} ({config.data.tokenizer})", err=True)
    report = prepare_data(config.data.source, folder, val=config.data.val or None, tokenizer=config.data.tokenizer)
    print_prepared(report)


def dotted_overrides(arguments: list[str]) -> dict[str, str]:
    """`--train.steps 40` and `--train.steps=40` as {"train.steps": "40"}."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag:
            raise UserError(f"unexpected argument {flag}; settings look like --train.steps 40")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{name} needs a value")
            value = rest.pop(0)
        overrides[name] = value
    return overrides


@cli.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, help="Story file, folder, named source, or a folder made by `tinystories prepare`."
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of JSONL, CSV and parquet files."
)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="Only that many stories (0: all).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object last.")
def evaluate(model: Path, data: str, text_field: str, limit: int, device: str, as_json: bool) -> None:
    """Measure a model in bits per byte over whole stories (docs/evaluation.md).

    Each story stands on its own after <|endoftext|>; its closing <|endoftext|> counts. Lower is better.
    """
    from tinystories.evaluate.report import evaluate_model

    from tinystories.checkpoint import read_model

    report = evaluate_model(read_model(model), data, text_field=text_field, limit=limit, device=device)
    low, high = report.interval
    click.echo(f"{report.bits_per_byte:.4f} bits per byte (95 % interval {low:.4f} to {high:.4f} over the stories)")
    click.echo(
        f"{report.nats_per_token:.4f} nats per token; {report.stories:,} stories, {report.tokens:,} tokens,"
        f" {report.bytes:,} bytes in {report.seconds:.1f} s"
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--config", "config_file", help=f"TOML file, or a preset: {', '.join(PRESETS)}.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object last.")
def info(path: Path | None, config_file: str | None, as_json: bool) -> None:
    """Tell what a model directory, a prepared folder or a config is: sizes, parameters, where it came from."""
    if (path is None) == (config_file is None):
        raise UserError("name either a model or data directory, or --config FILE")
    facts = describe_config(load_config(config_file)) if config_file else describe_path(path or Path())
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        for line, (key, item) in enumerate(value.items() if isinstance(value, dict) else [("", value)]):
            text = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else str(item)
            click.echo(f"{name if line == 0 else '':16}  {key + ' ' if key else ''}{text}")


def describe_config(config: Config) -> dict[str, Any]:
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    facts: dict[str, Any] = {"parameters": config.model.n_params, "training_tokens": tokens}
    if config.model.vocab_size == 0:
        vocab = int(config.data.tokenizer.removeprefix("bpe:")) if config.data.tokenizer.startswith("bpe:") else 50257
        sized = dataclasses.replace(config.model, vocab_size=vocab)
        facts["parameters"] = sized.n_params
        facts["vocabulary"] = f"{vocab} (that of data.tokenizer={config.data.tokenizer}; the data decides)"
    return facts | dataclasses.asdict(config)


def describe_path(path: Path) -> dict[str, Any]:
    from tinystories import checkpoint
    from tinystories.data.prepared import read_meta

    if not checkpoint.is_model(path) and (path / "meta.json").is_file():
        return dataclasses.asdict(read_meta(path))
    files = checkpoint.read_model(path)
    return {
        "parameters": files.config.n_params,
        "model": dataclasses.asdict(files.config),
        "sampling": dataclasses.asdict(files.sampling),
        "provenance": files.provenance,
    }


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="How the story begins.  [default: the model begins]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=400, show_default=True, help="Longest continuation.")
@click.option("--temperature", type=float, help="0: always the likeliest token.")
@click.option("--top-k", type=int, help="Only the K likeliest tokens (0: off).")
@click.option("--top-p", type=float, help="Only the likeliest tokens that make up P (1: off).")
@click.option("--min-p", type=float, help="Only tokens at least P times as likely as the likeliest (0: off).")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens already used become less likely (1: off).")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same story.  [default: a new one each time]")
@click.option("--num", type=click.IntRange(min=1), default=1, show_default=True, help="How many stories.")
@click.option("--stop", multiple=True, help="End the story before this text; may be repeated.")
@click.option("--ignore-end", is_flag=True, help="Go on with a new story after <|endoftext|>, up to --max-tokens.")
@click.option(
    "--engine", type=click.Choice(["auto", "torch"]), default="auto", show_default=True, help="What computes."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the weights.",
)
@click.option("--stream/--no-stream", default=True, show_default=True, help="Show text as it is made.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write to FILE.txt or FILE.jsonl.")
def generate(
    model: Path,
    prompt: str,
    max_tokens: int,
    seed: int | None,
    num: int,
    stop: tuple[str, ...],
    ignore_end: bool,
    engine: str,
    device: str,
    precision: str,
    stream: bool,
    out: Path | None,
    **sampling: float | int | None,
) -> None:
    """Write stories with a trained model. Sampling defaults are the model's own (generation.json).

    Text goes to standard output, everything else to standard error.
    """
    from tinystories.generate.output import write_stories

    write_stories(
        model,
        prompt=prompt,
        max_tokens=max_tokens,
        seed=seed,
        num=num,
        stop=stop,
        ignore_end=ignore_end,
        engine=engine,
        device=device,
        precision=precision,
        stream=stream,
        out=out,
        sampling=sampling,
    )
