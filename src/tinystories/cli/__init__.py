"""The command line: every command parses its arguments into settings and calls one function.

Only this package prints, and only this package catches UserError. Heavy imports (torch above all) happen inside the
commands, so that `--help` is instant.
"""

import copy
import sys

import click

from tinystories.cli.common import CONTEXT_SETTINGS, run
from tinystories.cli.exchange.fetch import fetch
from tinystories.cli.exchange.interop import export, import_, push
from tinystories.cli.measure.bench import bench
from tinystories.cli.measure.evaluate import evaluate
from tinystories.cli.measure.info import info
from tinystories.cli.measure.trace import trace
from tinystories.cli.train.prepare import prepare
from tinystories.cli.train.sweep import sweep
from tinystories.cli.train.train import train
from tinystories.cli.write.generate import generate
from tinystories.cli.write.lab import lab
from tinystories.cli.write.quantize import quantize, warmup
from tinystories.cli.write.serve import serve


@click.group(context_settings=CONTEXT_SETTINGS)
@click.version_option(package_name="tinystories-gpt")
def cli() -> None:
    """Train a small storyteller from scratch and read its stories.

    \b
    Start here (no network; training takes about a minute and needs the [train] extra):
      tinystories generate
      tinystories prepare sample --tokenizer bpe:1024 --out data/sample
      tinystories train --config nano --data data/sample --out runs/first --train.steps 60
      tinystories generate runs/first --prompt "Once upon a time"

    Details of a command: tinystories COMMAND --help
    """


COMMANDS = (
    prepare,
    train,
    sweep,
    generate,
    serve,
    lab,
    evaluate,
    trace,
    info,
    quantize,
    warmup,
    export,
    import_,
    push,
    fetch,
    bench,
)

for command in COMMANDS:
    cli.add_command(command)

# `tinystories pack` is the former name of `quantize`. It keeps working and is not listed in `tinystories --help`.
pack = copy.copy(quantize)
pack.hidden = True
cli.add_command(pack, "pack")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `tinystories`. Exit codes: 0 success, 1 failure, 2 user error, 128+n stopped by signal n."""
    sys.exit(run(cli, argv))
