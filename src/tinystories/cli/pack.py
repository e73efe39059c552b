"""`tinystories pack` and `tinystories warmup`: what `generate` does by itself when it is needed, ahead of time."""

from pathlib import Path

import click

from tinystories.cli.command import SETTINGS, model_argument


@click.command(context_settings=SETTINGS)
@model_argument()
@click.option(
    "--precision",
    type=click.Choice(["int8", "int4"]),
    multiple=True,
    default=["int8"],
    show_default=True,
    help="Bits of a weight; may be repeated.",
)
def pack(model: Path, precision: tuple[str, ...]) -> None:
    """Pack the weights of MODEL for the CPU engine.

    Writes packed-int8.safetensors or packed-int4.safetensors into its folder; `generate` does so when it needs one.
    """
    from tinystories.checkpoint import read_model
    from tinystories.engine.cpu.weights import Mapped, packed, packed_path
    from tinystories.errors import UserError

    files = read_model(model, check_weights=False)
    for name in precision:
        path = packed_path(files, name)  # type: ignore[arg-type]
        if not isinstance(packed(files, name), Mapped):  # type: ignore[arg-type]
            raise UserError(f"{path} could not be written; the folder or the disk refuses it")
        sizes = path.stat().st_size / 1e6, files.weights_path.stat().st_size / 1e6
        click.echo(f"{path}: {sizes[0]:,.1f} MB ({sizes[1]:,.1f} MB in fp32)")


@click.command(context_settings=SETTINGS)
def warmup() -> None:
    """Compile the CPU engine for this machine, so that the first story starts at once.

    Takes some seconds, once. The code is kept in the user's cache folder; the environment variable TINYSTORIES_CACHE
    names another.
    """
    from tinystories.engine.cpu import native

    native.load()
    path = native.cached_path()
    click.echo(f"ready: {path}" if path.exists() else "compiled, but it could not be kept")
