"""`tinystories fetch`."""

import shlex
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS
from tinystories.errors import UserError


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where it goes.  [default: models/NAME]")
def fetch(name: str | None, out: Path | None) -> None:
    """Download published weights by NAME, checked by hash; without NAME, list them.

    Weights that others publish need no name here: tinystories generate hf:OWNER/NAME
    """
    from tinystories.interop import published

    entries = published.read_registry()
    if name is None:
        for key, entry in entries.items():
            click.echo(f"{key:16}  {entry['text']} (hf:{entry['repository']})")
        if not entries:
            click.echo("nothing has been published yet")
        return
    out = out or Path("models") / name
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    published.fetch(name, out, entries)
    click.echo(f'{out}; next: tinystories generate {shlex.quote(str(out))} --prompt "Once upon a time"')
