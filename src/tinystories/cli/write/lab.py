"""`tinystories lab`."""

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinystories.cli.common import FILE, engine_options, model_argument
from tinystories.cli.write.serve import check_packages, lab_options, run_server

if TYPE_CHECKING:
    from tinystories.engine.engine_config import EngineConfig


@click.command()
@model_argument(bundled=True)
@click.option("--no-browser", is_flag=True, help="Print the URL only.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (0: any that is free).")
@click.option(
    "--api-key-file", type=FILE, help="File with keys, one a line; any of them opens.  [default: $TINYSTORIES_API_KEY]"
)
@lab_options
@engine_options(
    "Inference engine. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).",
    "Weight precision. cpu: int8 (auto), int4 or fp32; torch: bf16 if the hardware supports it, else fp32 (auto).",
)
def lab(
    model: Path,
    engine_config: "EngineConfig",
    no_browser: bool,
    port: int,
    api_key_file: Path | None,
    runs_folder: Path | None,
    compare_model: Path | None,
) -> int:
    """Look inside MODEL or the bundled storyteller, in the browser.

    Starts `tinystories serve` for this machine only, prints the URL of the lab and opens it: the tokens of a text and
    how much each surprises the model, what could come next, where each head looks, what each layer would say; how a
    run learns while it trains, and two models side by side. Nothing leaves this machine. Ctrl-C ends it. What the page
    shows is explained in docs/lab.md.
    """
    check_packages()
    import logging

    from tinystories.serve.settings import ServerConfig, read_keys

    def announce(url: str) -> None:
        click.echo(f"{url}/lab")
        click.echo(f"The storyteller is at {url}/ and Ctrl-C ends both.", err=True)
        if not no_browser:
            webbrowser.open(f"{url}/lab")

    config = ServerConfig(port=port, keys=read_keys(api_key_file), runs_folder=runs_folder, compare_model=compare_model)
    return run_server(model, engine_config, None, config, logging.WARNING, announce)
