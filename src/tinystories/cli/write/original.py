"""The three commands of the original program, `gpt.py`, `generate.py` and `sample.py`, for any data and model."""

import sys
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS, FILE, PATH, Decorator, add_options
from tinystories.cli.train.train import check_or_prepare_data, parse_overrides, run_training
from tinystories.cli.write.generate import print_stories
from tinystories.config import Config
from tinystories.config_file import PRESETS, load_config

SECONDS_PER_DAY = 24 * 3600
DEFAULT_PRESET = "seed-89m"
RUN = Path("runs") / DEFAULT_PRESET

model_option = click.option(
    "--model", type=PATH, help=f"Model directory.  [default: {RUN}, or the bundled storyteller]"
)


def story_options(tokens: int, tokens_help: str, seed: int | None = None) -> Decorator:
    """Add --tokens, --prompt and --seed, with the defaults of a command."""
    seed_help = (
        "Same seed, same text.  [default: a new seed each time]" if seed is None else "Random seed of the stories."
    )
    return add_options(
        click.option("--tokens", type=click.IntRange(min=1), default=tokens, help=tokens_help),
        click.option("--prompt", default="", show_default=False, help="Beginning of the first story."),
        click.option("--seed", type=click.IntRange(min=0), default=seed, show_default=seed is not None, help=seed_help),
    )


@click.command(context_settings=CONTEXT_SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--config", "config_file", default=DEFAULT_PRESET, help=f"TOML file, or: {', '.join(PRESETS)}.")
@click.option("--data", type=PATH, help="Prepared data.  [default: the config's, prepared if absent]")
@click.option("--out", type=PATH, help="Run directory.  [default: runs/NAME of --config]")
@story_options(10_000, "Tokens to generate after training.", seed=0)
@click.option("--text", type=FILE, default=Path("generated.txt"), help="File for the generated text (.txt or .jsonl).")
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
    """Train a model, then generate 10,000 tokens to the screen and to generated.txt.

    Without arguments, it trains the original model (89,274,368 parameters, GPT-2 tokenizer) on TinyStories. Change
    settings as in `tinystories train`: --train.steps 500, --optim.learning_rate 1e-3, ... After an interrupt, the same
    command resumes; once training is complete, it only generates.
    """
    from tinystories.generate.output import check_output_path

    check_output_path(text)
    out = out or Path("runs") / Path(config_file).stem
    config = load_config(config_file, parse_overrides(context) | ({"data.dir": str(data)} if data else {}))
    if not confirm_long_run(config, out, ask=not yes):
        return 1
    resume = (out / "config.toml").exists()
    if data is None:
        check_or_prepare_data(config, out, config_file, resume=resume)
    result = run_training(config, out, resume=resume)
    if isinstance(result, int):
        return result
    write_tokens(out, prompt=prompt, tokens=tokens, seed=seed, stream=True, text=text)
    return 0


@click.command(context_settings=CONTEXT_SETTINGS)
@model_option
@story_options(500, "Tokens to generate.")
@click.option("--text", type=FILE, help="Also write to this file (.txt or .jsonl).")
def generate(model: Path | None, tokens: int, prompt: str, seed: int | None, text: Path | None) -> None:
    """Generate 500 tokens, story after story, and print them when all are done.

    If the default model has not been trained yet, the bundled storyteller writes them.
    """
    write_tokens(choose_model(model), prompt=prompt, tokens=tokens, seed=seed, stream=False, text=text)


@click.command(context_settings=CONTEXT_SETTINGS)
@model_option
@story_options(500, "Tokens to generate.")
def sample(model: Path | None, tokens: int, prompt: str, seed: int | None) -> None:
    """Generate 500 tokens, story after story, and print each as it is generated.

    If the default model has not been trained yet, the bundled storyteller writes them.
    """
    write_tokens(choose_model(model), prompt=prompt, tokens=tokens, seed=seed, stream=True)


def choose_model(model: Path | None) -> Path:
    """Return `model`; without one, the default run, or the bundled storyteller if that has not been trained yet."""
    from tinystories.checkpoint import BUNDLED_MODEL, is_model

    if model is not None or is_model(RUN):
        return model or RUN
    click.echo(f"no trained model in {RUN} (train one with: python gpt.py): using the bundled storyteller", err=True)
    return BUNDLED_MODEL


def write_tokens(
    model: Path, *, prompt: str, tokens: int, seed: int | None, stream: bool, text: Path | None = None
) -> None:
    """Print `tokens` tokens, story after story, and write them to `text` if given."""
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.generate.storyteller import Storyteller

    storyteller = Storyteller.load(model, EngineConfig(n_slots=1))
    request = storyteller.build_request(prompt, {"max_tokens": tokens, "seed": seed, "ignore_end": True})  # type: ignore[typeddict-item]
    print_stories(storyteller, request, 1, stream=stream, out=text)


def confirm_long_run(config: Config, out: Path, *, ask: bool) -> bool:
    """Warn if training would take more than a day; return False if the user then declines."""
    from tinystories.cli.train.train import is_finished
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
        f"This run will take about {days:.0f} days on this machine ({device}), estimated from its matmul speed."
        " Smaller presets: --config nano (minutes on a CPU), --config small (about an hour).",
        err=True,
    )
    return not (ask and sys.stdin.isatty()) or click.confirm("Train anyway?", err=True)
