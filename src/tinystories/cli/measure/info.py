"""`tinystories info`."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import click

from tinystories.cli.common import json_flag
from tinystories.config import Config
from tinystories.config_file import PRESETS, load_config
from tinystories.errors import UserError, one_line
from tinystories.files import read_limited
from tinystories.train.optimizer.learning_rate import resolve_auto_rates

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1_000_000  # real cards have a few thousand
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # a card's YAML metadata, read by the Hub


@click.command()
@click.argument("path", required=False)
@click.option("--config", "config_file", help=f"TOML file, or a preset: {', '.join(PRESETS)}.")
@click.option("--card", "as_card", is_flag=True, help="Print a model card (README.md) for the Hub.")
@json_flag
def info(path: str | None, config_file: str | None, as_card: bool, as_json: bool) -> None:
    """Describe PATH or a config: sizes, parameters, provenance, and the model card if there is one.

    PATH is a model directory, hf:OWNER/NAME, or a folder of prepared data. Without PATH and --config, describe the
    bundled storyteller. For a model, also say which machine code and how many threads the CPU engine uses here and why.
    """
    if path is not None and config_file is not None:
        raise UserError("give either PATH or --config, not both")
    if as_card and (config_file is not None or as_json):
        raise UserError("--card describes a model directory as Markdown; leave out --config and --json")
    if config_file is not None:
        facts, folder = describe_config(load_config(config_file)), None
    else:
        from tinystories.hub.client import resolve_model_folder

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
            click.echo(f"{name if line == 0 else '':16}  {one_line(key) + ' ' if key else ''}{format_fact(item)}")
    if folder is not None and (folder / CARD_FILE).is_file():
        click.echo("\n" + FRONT_MATTER.sub("", read_or_make_card(folder)), nl=False)


def format_fact(value: object) -> str:
    """Format a fact for people: thousands separators, lists and mappings in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{one_line(name)} {format_fact(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(format_fact, value))
    return one_line(value) if value != "" else "-"


def read_or_make_card(folder: Path) -> str:
    """Return the README.md of a model directory, or a model card built from its config.json."""
    from tinystories.formats.bundle import ModelBundle
    from tinystories.hub.card import build_model_card

    path = folder / CARD_FILE
    if not path.is_file():
        return build_model_card(ModelBundle.read(folder))
    return read_limited(path, MAX_CARD_BYTES).decode(errors="replace")


def describe_config(config: Config) -> dict[str, Any]:
    """Return all settings, with the number of parameters, the training tokens and the resolved learning rates."""
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    facts: dict[str, Any] = {"parameters": config.model.n_params, "training_tokens": tokens}
    if config.model.vocab_size == 0:
        vocab_size = (
            int(config.data.tokenizer.removeprefix("bpe:")) if config.data.tokenizer.startswith("bpe:") else 50257
        )
        sized_model = dataclasses.replace(config.model, vocab_size=vocab_size)
        facts["parameters"] = sized_model.n_params
        facts["vocabulary"] = f"{vocab_size} (from data.tokenizer={config.data.tokenizer}; the prepared data decides)"
    optim = resolve_auto_rates(config).optim
    facts["peak_rates"] = {"learning_rate": optim.learning_rate, "muon_rate": optim.muon_rate}
    return facts | dataclasses.asdict(config)


def describe_path(path: Path) -> dict[str, Any]:
    """Return the facts of a model directory or of prepared data. `UserError` if the path is neither."""
    from tinystories import checkpoint
    from tinystories.data.dataset import read_meta

    if not checkpoint.is_model(path) and (path / "meta.json").is_file():
        return dataclasses.asdict(read_meta(path))
    from tinystories.engine.cpu import jit, thread_pool
    from tinystories.engine.cpu.target import select_target

    files = checkpoint.read_model(path)
    return {
        "parameters": files.config.n_params,
        "model": dataclasses.asdict(files.config),
        "sampling": dataclasses.asdict(files.sampling),
        "provenance": files.provenance,
        "cpu_engine": select_target().as_facts()
        | {"code": jit.describe_code(), "threads": thread_pool.describe_threads()},
    }
