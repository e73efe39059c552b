"""The command line: arguments to settings to one function call. The only place that prints and that catches UserError.

Heavy imports (torch above all) happen inside the commands, so that `--help` answers at once.
"""

import sys

import click

from tinystories.cli.bench import bench
from tinystories.cli.common import CONTEXT_SETTINGS, run
from tinystories.cli.evaluate import evaluate
from tinystories.cli.fetch import fetch
from tinystories.cli.generate import generate
from tinystories.cli.info import info
from tinystories.cli.interop import export, import_, push
from tinystories.cli.pack import pack, warmup
from tinystories.cli.prepare import prepare
from tinystories.cli.sweep import sweep
from tinystories.cli.train import train


@click.group(context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="tinystories-gpt")
def cli() -> None:
    """Train a small storyteller from scratch and read its stories.

    \b
    Start here (no network; training takes about a minute, and needs the extra [train]):
      tinystories generate
      tinystories prepare sample --tokenizer bpe:1024 --out data/sample
      tinystories train --config nano --data data/sample --out runs/first --train.steps 60
      tinystories generate runs/first --prompt "Once upon a time"

    Every command explains itself: tinystories COMMAND --help
    """


for command in (prepare, train, sweep, generate, evaluate, info, pack, warmup, export, import_, push, fetch, bench):
    cli.add_command(command)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `tinystories` command: exits 0 done, 1 failed, 2 the user's mistake, 128+n signal n."""
    sys.exit(run(cli, argv))
