"""`tinystories lab`."""

import dataclasses
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tinystories.cli.common import FILE, engine_options, model_argument
from tinystories.cli.write.serve import check_packages, describe_model, lab_options, run_server
from tinystories.errors import UserError

if TYPE_CHECKING:
    from tinystories.engine.engine_config import EngineConfig
    from tinystories.generate.storyteller import Storyteller
    from tinystories.serve.model import ServedModel


@click.command()
@model_argument(bundled=True)
@click.option("--text", help="With --out: the text that the file is about.")
@click.option("--out", type=FILE, help="Write one HTML file that needs no server, instead of starting one.")
@click.option("--no-browser", is_flag=True, help="Print the URL only.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (0: any that is free).")
@click.option(
    "--api-key-file", type=FILE, help="File with keys, one a line; any of them opens.  [default: $TINYSTORIES_API_KEY]"
)
@lab_options
@engine_options(
    "Inference engine. auto: torch if CUDA is available, otherwise cpu (no torch needed, starts instantly).",
    "Precision. cpu: int8 (auto), int8-a8 (int8 weights, 8-bit activations: faster prompts and batches), int4 or fp32;"
    " torch: bf16 if the hardware supports it, else fp32 (auto).",
)
def lab(
    model: Path,
    engine_config: "EngineConfig",
    text: str | None,
    out: Path | None,
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

    \b
    With --text and --out it writes the page about one text into a file, to hand out or to keep:
      tinystories lab --text "Lily had a red ball. Tom took the" --out page.html
    """
    if (text is None) != (out is None):
        raise UserError("--text and --out belong together: the text, and the file to write the page about it to")
    if text is not None and out is not None:
        return write_page(model, engine_config, text, out)
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


def write_page(model: Path, engine_config: "EngineConfig", text: str, out: Path) -> int:
    """Write the page about a text. Needs none of the packages of the server."""
    from tinystories.files import require_regular_file, write_atomic, write_errors
    from tinystories.serve.lab.recording import N_ENDINGS, record
    from tinystories.serve.lab.single_file import build_page

    require_regular_file(out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    storyteller, served = load_for_recording(model, dataclasses.replace(engine_config, n_slots=N_ENDINGS))
    page = build_page(record(storyteller, served, text))
    with write_errors(out):
        write_atomic(out, page)
    click.echo(f"wrote {out} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser; it needs nothing else")
    return 0


def load_for_recording(model: Path, engine_config: "EngineConfig") -> "tuple[Storyteller, ServedModel]":
    """Load a model directory and describe it as the server does."""
    from tinystories.engine.select import load_engine
    from tinystories.generate.storyteller import Storyteller

    files, engine = load_engine(model, engine_config)
    served = describe_model(files, engine, model, engine_config)
    return Storyteller(engine, served.tokenizer, served.sampling), served
