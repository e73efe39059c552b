"""The original program's three commands, `gpt.py`, `generate.py` and `sample.py`, on any data and model."""

import sys
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS
from tinystories.cli.generate import print_stories
from tinystories.cli.train import ensure_prepared, parse_overrides, run_training
from tinystories.config import PRESETS, Config, load_config

SECONDS_PER_DAY = 24 * 3600
DEFAULT_PRESET = "seed-89m"
RUN = Path("runs") / DEFAULT_PRESET


@click.command(context_settings=CONTEXT_SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    "--config", "config_file", default=DEFAULT_PRESET, show_default=True, help=f"TOML file, or: {', '.join(PRESETS)}."
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Prepared folder.  [default: the config's, made if absent]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where weights are saved.  [default: runs/NAME of the config]"
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=10_000, show_default=True, help="To write after training."
)
@click.option("--prompt", default="", help="How the first story begins.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the stories.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("generated.txt"),
    show_default=True,
    help="File for what is written (.txt or .jsonl).",
)
@click.option("--yes", is_flag=True, help="Do not ask before a run that takes more than a day.")
@click.pass_context
def gpt(
    context: click.Context,
    config_file: str,
    data: Path | None,
    out: Path | None,
    tokens: int,
    prompt: str,
    seed: int,
    text: Path,
    yes: bool,
) -> int:
    """Train, then write 10,000 new tokens to the screen and to generated.txt.

    Without arguments: the original model (89,274,368 parameters, GPT-2 tokeniser) on TinyStories. Settings may be
    changed as for `tinystories train`: --train.steps 500, --optim.learning_rate 1e-3, ... Run again after an
    interrupt, it goes on where it stopped; after the end of training, it only writes.
    """
    from tinystories.generate.output import check_output_path

    check_output_path(text)
    out = out or Path("runs") / Path(config_file).stem
    config = load_config(config_file, parse_overrides(context) | ({"data.dir": str(data)} if data else {}))
    if not confirm_long_run(config, out, ask=not yes):
        return 1
    if data is None:
        ensure_prepared(config)
    code = run_training(config, out, resume=(out / "config.toml").exists())
    return code or write_tokens(out, prompt=prompt, tokens=tokens, seed=seed, stream=True, text=text)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path("runs") / DEFAULT_PRESET,
    show_default=True,
    help="Model directory.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True, help="How many to write.")
@click.option("--prompt", default="", help="How the first story begins.")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same text.  [default: a new one each time]")
@click.option(
    "--text", type=click.Path(path_type=Path, dir_okay=False), help="Also write to this file (.txt or .jsonl)."
)
def generate(model: Path, tokens: int, prompt: str, seed: int | None, text: Path | None) -> int:
    """Write 500 tokens with a trained model: one story after another, printed when all are there."""
    return write_tokens(model, prompt=prompt, tokens=tokens, seed=seed, stream=False, text=text)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path("runs") / DEFAULT_PRESET,
    show_default=True,
    help="Model directory.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True, help="How many to print.")
@click.option("--prompt", default="", help="How the first story begins.")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same text.  [default: a new one each time]")
def sample(model: Path, tokens: int, prompt: str, seed: int | None) -> int:
    """Print tokens of a trained model as they are made."""
    return write_tokens(model, prompt=prompt, tokens=tokens, seed=seed, stream=True, text=None)


def write_tokens(model: Path, *, prompt: str, tokens: int, seed: int | None, stream: bool, text: Path | None) -> int:
    """So many tokens, story after story."""
    from tinystories.generate.storyteller import Storyteller

    storyteller = Storyteller.load(model, n_slots=1)
    options = {"max_tokens": tokens, "ignore_end": True} | ({} if seed is None else {"seed": seed})
    print_stories(storyteller, storyteller.build_request(prompt, options), 1, stream=stream, out=text)  # type: ignore[arg-type]
    return 0


def confirm_long_run(config: Config, out: Path, *, ask: bool) -> bool:
    """Say so where training would take more than a day; False if the user then declines."""
    from tinystories.cli.train import is_finished
    from tinystories.config import replace_vocab
    from tinystories.engine.device import select_device
    from tinystories.train.estimate import estimate_train_seconds

    if is_finished(out):
        return True
    vocab_size = config.model.vocab_size or 50257
    device = select_device(config.train.device)
    days = estimate_train_seconds(replace_vocab(config, vocab_size, "the config"), device) / SECONDS_PER_DAY
    if days <= 1:
        return True
    click.echo(
        f"This run will take about {days:.0f} days on this machine ({device}): an estimate from its speed in matrix"
        " products. Smaller presets: --config nano (minutes on a CPU), --config small (about an hour).",
        err=True,
    )
    return not (ask and sys.stdin.isatty()) or click.confirm("Train all the same?", err=True)
