"""`tinystories info`."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import click

from tinystories.cli.common import CONTEXT_SETTINGS, json_option
from tinystories.config import PRESETS, Config, load_config
from tinystories.errors import UserError
from tinystories.train.learning_rate import resolve_auto_rates

CARD_FILE = "README.md"
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # what the Hub reads of a card


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("path", required=False)
@click.option("--config", "config_file", help=f"TOML file, or a preset: {', '.join(PRESETS)}.")
@click.option("--card", "as_card", is_flag=True, help="Print a model card (README.md) for the model's page on the Hub.")
@json_option
def info(path: str | None, config_file: str | None, as_card: bool, as_json: bool) -> None:
    """Tell what PATH or a config is: sizes, parameters, where it came from, and the model card where there is one.

    PATH is a model directory, hf:OWNER/NAME, or a folder of prepared data; without it and --config, the storyteller
    that comes with the package.
    """
    if path is not None and config_file is not None:
        raise UserError("name either a model or data directory, or --config FILE")
    if as_card and (config_file is not None or as_json):
        raise UserError("--card is of a model directory, and no JSON; leave --config and --json out")
    if config_file is not None:
        facts, folder = describe_config(load_config(config_file)), None
    else:
        from tinystories.interop.hub import resolve_model_folder

        folder = resolve_model_folder(path)
        if as_card:
            click.echo(read_or_make_card(folder), nl=False)
            return
        facts = describe_path(folder)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        for line, (key, item) in enumerate(value.items() if isinstance(value, dict) else [("", value)]):
            click.echo(f"{name if line == 0 else '':16}  {key + ' ' if key else ''}{format_fact(item)}")
    if folder is not None and (folder / CARD_FILE).is_file():
        click.echo("\n" + FRONT_MATTER.sub("", read_or_make_card(folder)), nl=False)


def format_fact(value: object) -> str:
    """A fact as people read it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_fact(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(format_fact, value))
    return str(value) if value != "" else "-"


def read_or_make_card(folder: Path) -> str:
    """The model card that lies in a model directory, or one made of what config.json says."""
    from tinystories.interop.model_bundle import ModelBundle
    from tinystories.interop.model_card import build_model_card

    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else build_model_card(ModelBundle.read(folder))


def describe_config(config: Config) -> dict[str, Any]:
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    facts: dict[str, Any] = {"parameters": config.model.n_params, "training_tokens": tokens}
    if config.model.vocab_size == 0:
        vocab_size = (
            int(config.data.tokenizer.removeprefix("bpe:")) if config.data.tokenizer.startswith("bpe:") else 50257
        )
        sized_model = dataclasses.replace(config.model, vocab_size=vocab_size)
        facts["parameters"] = sized_model.n_params
        facts["vocabulary"] = f"{vocab_size} (that of data.tokenizer={config.data.tokenizer}; the data decides)"
    optim = resolve_auto_rates(config).optim
    facts["peak_rates"] = {"learning_rate": optim.learning_rate, "muon_rate": optim.muon_rate}
    return facts | dataclasses.asdict(config)


def describe_path(path: Path) -> dict[str, Any]:
    from tinystories import checkpoint
    from tinystories.data.dataset import read_meta

    if not checkpoint.is_model(path) and (path / "meta.json").is_file():
        return dataclasses.asdict(read_meta(path))
    files = checkpoint.read_model(path)
    return {
        "parameters": files.config.n_params,
        "model": dataclasses.asdict(files.config),
        "sampling": dataclasses.asdict(files.sampling),
        "provenance": files.provenance,
    }
