"""The command line: every command parses its arguments into settings and calls one function.

Only this package prints, and only this package catches UserError. Heavy imports (torch above all) happen inside the
commands, so that `--help` is instant.
"""

import copy
import importlib
import sys

import click

from tinystories.cli.common import CONTEXT_SETTINGS, run

# The module of each command, and its name there.
COMMANDS = {
    "prepare": ("train.prepare", "prepare"),
    "train": ("train.train", "train"),
    "sweep": ("train.sweep", "sweep"),
    "generate": ("write.generate", "generate"),
    "serve": ("write.serve", "serve"),
    "lab": ("write.lab", "lab"),
    "eval": ("measure.evaluate", "evaluate"),
    "trace": ("measure.trace", "trace"),
    "info": ("measure.info", "info"),
    "quantize": ("write.quantize", "quantize"),
    "warmup": ("write.quantize", "warmup"),
    "export": ("exchange.interop", "export"),
    "import": ("exchange.interop", "import_"),
    "push": ("exchange.interop", "push"),
    "fetch": ("exchange.fetch", "fetch"),
    "bench": ("measure.bench", "bench"),
}


class CommandGroup(click.Group):
    """Imports a command when it is asked for, since importing all takes a tenth of a server's start."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:  # noqa: ARG002
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context | None, name: str) -> click.Command | None:
        """Return a command; None if it does not exist."""
        if name == "pack":  # the former name of `quantize`: it keeps working and is not listed
            pack = copy.copy(self.get_command(ctx, "quantize"))
            assert pack is not None, "listed above"
            pack.hidden = True
            return pack
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        try:
            command: click.Command = getattr(importlib.import_module(f"tinystories.cli.{module}"), attribute)
        except KeyboardInterrupt:
            raise click.Abort from None  # before which click does not print an empty line
        return command


@click.group(cls=CommandGroup, context_settings=CONTEXT_SETTINGS)
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


def main(argv: list[str] | None = None) -> None:
    """Entry point of `tinystories`. Exit codes: 0 success, 1 failure, 2 user error, 128+n stopped by signal n."""
    sys.exit(run(cli, argv))
