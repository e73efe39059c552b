"""`tinystories info`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from tinystories.cli.command import SETTINGS, json_option, model_argument
from tinystories.config import PRESETS, Config, load_config
from tinystories.errors import UserError
from tinystories.train.rates import settled


@click.command(context_settings=SETTINGS)
@model_argument("path", required=False)
@click.option("--config", "config_file", help=f"TOML file, or a preset: {', '.join(PRESETS)}.")
@click.option("--card", "as_card", is_flag=True, help="Print a model card (README.md) for the model's page on the Hub.")
@json_option
def info(path: Path | None, config_file: str | None, as_card: bool, as_json: bool) -> None:
    """Tell what a model directory, a prepared folder or a config is: sizes, parameters, where it came from."""
    if (path is None) == (config_file is None):
        raise UserError("name either a model or data directory, or --config FILE")
    if as_card:
        if path is None or as_json:
            raise UserError("--card is of a model directory, and no JSON; leave --config and --json out")
        from tinystories.interop.card import card
        from tinystories.interop.portable import Portable

        click.echo(card(Portable.read(path)), nl=False)
        return
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
    optim = settled(config).optim
    facts["peak_rates"] = {"learning_rate": optim.learning_rate, "muon_rate": optim.muon_rate}
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
