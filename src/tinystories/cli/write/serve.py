"""`tinystories serve`."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.common import FILE, PATH, Command, engine_options, model_argument
from tinystories.errors import UserError

if TYPE_CHECKING:
    from tinystories.checkpoint import ModelFiles
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.engine.protocol import Engine
    from tinystories.serve.model import ServedModel

SERVE_MODULES = ("starlette", "uvicorn", "msgspec", "prometheus_client")
SLOTS_PER_CORE, MIN_AUTO_SLOTS, MAX_AUTO_SLOTS = 8, 16, 64
DEFAULT_RUNS = Path("runs")
LOG_LEVELS = ("debug", "info", "warning", "error")


class SlotCount(click.ParamType[int | None]):
    """A number of slots, or auto."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        return click.IntRange(min=1, max=1024).convert(value, param, ctx)


def lab_options(command: Command) -> Command:
    """Add --runs and --compare; the command receives the folders as `runs_folder` and `compare_model`."""

    @click.option(
        "--runs",
        type=PATH,
        metavar="DIR",
        help="Folder of training runs that the lab shows.  [default: runs, if there is such a folder]",
    )
    @click.option("--compare", metavar="MODEL", help="A second model, which the lab compares with the first.")
    @functools.wraps(command)
    def wrapper(*, runs: Path | None, compare: str | None, **kwargs: Any) -> Any:
        from tinystories.checkpoint import read_model
        from tinystories.hub.client import resolve_model_folder

        if runs is None and DEFAULT_RUNS.is_dir() and not (DEFAULT_RUNS / "metrics.jsonl").exists():
            runs = DEFAULT_RUNS
        compare_model = None if compare is None else resolve_model_folder(compare)
        if compare_model is not None:
            read_model(compare_model, verify_weights=False)  # a mistake is reported now
        return command(runs_folder=runs, compare_model=compare_model, **kwargs)

    return wrapper


@click.command()
@model_argument(bundled=True)
@click.option("--host", default="127.0.0.1", help="Address to listen on. Another one than this machine's needs a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on (0: any that is free).")
@engine_options(
    "Inference engine. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).",
    "Precision. cpu: int8 (auto), int8-a8 (int8 weights, 8-bit activations: faster prompts and batches), int4 or fp32;"
    " torch: bf16 if the hardware supports it, else fp32 (auto).",
)
@click.option(
    "--slots",
    type=SlotCount(),
    default="auto",
    help="Stories written at once. auto: 8 for each core, from 16 to 64.",
)
@click.option(
    "--queue", type=click.IntRange(0, 100_000), help="Stories that may wait for a slot.  [default: 4 for each slot]"
)
@click.option(
    "--api-key-file", type=FILE, help="File with keys, one a line; any of them opens.  [default: $TINYSTORIES_API_KEY]"
)
@click.option("--no-key", is_flag=True, help="Answer everybody, also on a --host that other machines can reach.")
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    help="Let web pages of this origin use the server, such as https://example.org ('*': all); can be repeated.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    help="Accept requests addressed to this name, as behind a reverse proxy; can be repeated.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, 86_400, min_open=True),
    default=120,
    help="Most seconds that a request may take.",
)
@click.option("--model-name", help="Name of the model for clients.  [default: that of its directory]")
@lab_options
@click.option("--log-level", type=click.Choice(LOG_LEVELS), default="info", help="What to report on stderr.")
def serve(
    model: Path,
    engine_config: "EngineConfig",
    slots: int | None,
    queue: int | None,
    api_key_file: Path | None,
    timeout: float,
    log_level: str,
    **options: Any,
) -> int:
    """Answer over HTTP as OpenAI's API does, with MODEL or the bundled storyteller.

    \b
    A completion continues the prompt; temperature and the like default to the model's own settings:
      tinystories serve
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "The little fox", "seed": 7}'
    In Python: openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

    Same seed, same story as `tinystories generate`. Ctrl-C lets running stories finish for ten seconds; a second one
    ends at once. Everything else is in docs/serve.md.
    """
    check_packages()
    from tinystories.serve.settings import ServerConfig, read_keys

    keys = () if options["no_key"] and api_key_file is None else read_keys(api_key_file)
    config = ServerConfig(n_queued=queue, timeout_s=timeout, keys=keys, **options)
    return run_server(model, engine_config, slots, config, getattr(logging, log_level.upper()))


def check_packages() -> None:
    """Raise `UserError` if a package of the extra is missing."""
    import importlib.util

    if missing := [name for name in SERVE_MODULES if importlib.util.find_spec(name) is None]:
        install_command = 'pip install "tinystories-gpt[serve]"'
        raise UserError(f"this command needs {', '.join(missing)}; run: {install_command}")


def run_server(
    model: Path,
    engine_config: "EngineConfig",
    slots: int | None,
    config: Any,
    log_level: int,
    announce: Callable[[str], None] | None = None,
) -> int:
    """Load the model and serve it; return the exit code. `announce` gets the URL; by default an example is printed."""
    from tinystories.engine.cpu.thread_pool import count_physical_cores
    from tinystories.engine.select import load_engine
    from tinystories.serve.server import bind, install_log_levels, serve

    install_log_levels(log_level)
    n_slots = slots or min(MAX_AUTO_SLOTS, max(MIN_AUTO_SLOTS, SLOTS_PER_CORE * count_physical_cores()))
    listener = bind(config)  # before the model is loaded: whether the port is free is known at once
    files, engine = load_engine(model, dataclasses.replace(engine_config, n_slots=n_slots))
    served = describe_model(files, engine, model, engine_config, config.model_name)

    def show_example(url: str) -> None:
        click.echo(url)
        body = json.dumps({"prompt": "The little fox", "seed": 7})
        key = " -H 'Authorization: Bearer YOUR_KEY'" if config.keys else ""
        click.echo(
            f"{served.name} with {n_slots} slots; try it:\n"
            f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'\n"
            f"or open {url} in a browser. Ctrl-C ends the server.",
            err=True,
        )

    return serve(engine, served, config, listener, announce or show_example)


def describe_model(
    files: "ModelFiles", engine: "Engine", model: Path, engine_config: "EngineConfig", name: str | None = None
) -> "ServedModel":
    """Return the description of a model directory that an engine has loaded; the default name is the directory's."""
    from tinystories.checkpoint import BUNDLED_MODEL
    from tinystories.engine.select import select_engine
    from tinystories.serve.model import ServedModel

    engine_name = select_engine(engine_config)
    default_precision = "int8" if engine_name == "cpu" else "auto"
    precision = default_precision if engine_config.precision == "auto" else engine_config.precision
    default_name = "tinystories" if model == BUNDLED_MODEL else model.resolve().name
    return ServedModel.describe(
        files,
        name=name or default_name,
        engine_name=engine_name,
        precision=getattr(engine, "precision", precision),
    )
