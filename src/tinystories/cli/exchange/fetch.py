"""`tinystories fetch`."""

import shlex
from pathlib import Path

import click

from tinystories.cli.common import CONTEXT_SETTINGS
from tinystories.errors import UserError


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("name", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Directory to write.  [default: models/NAME]"
)
def fetch(name: str | None, out: Path | None) -> None:
    """Download published weights by NAME and verify their checksums; without NAME, list what is published.

    Any other model on the Hugging Face Hub: tinystories generate hf:OWNER/NAME
    """
    from tinystories.hub import published

    entries = published.read_registry()
    if name is None:
        for key, entry in entries.items():
            click.echo(f"{key:16}  {entry['text']} (hf:{entry['repository']})")
        if not entries:
            click.echo("no weights have been published yet")
        return
    out = out or Path("models") / name
    if out.exists():
        raise UserError(f"--out {out} exists; choose another --out")
    published.fetch(name, out, entries)
    click.echo(f'wrote {out}; next: tinystories generate {shlex.quote(str(out))} --prompt "Once upon a time"')
