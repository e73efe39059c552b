"""Run a command so that errors become one line on stderr and an exit code; options that several commands share."""

import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from tinystories.errors import UserError
from tinystories.files import DISK_FULL_ERRNOS, describe_write_error
from tinystories.train.distributed import claim_error_message

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
PRECISION_CHOICES = ["auto", "fp32", "bf16", "int8", "int4"]
TRAIN_EXTRA_HINT = 'this command needs more packages; install them with: pip install "tinystories-gpt[train]"'

errors_option = click.option(
    "--errors",
    type=click.Choice(["strict", "replace"]),
    default="strict",
    show_default=True,
    help="Bytes that are not valid UTF-8: stop (strict) or replace them with U+FFFD (replace).",
)


def model_argument(
    name: str = "model", *, bundled: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the argument MODEL, a directory or hf:OWNER/NAME[@REVISION]; the command receives the directory.

    A model on the Hub is downloaded only after all options have been parsed. With `bundled`, MODEL is optional and
    defaults to the bundled storyteller.
    """

    def decorator(command: Callable[..., None]) -> Callable[..., None]:
        @click.argument(name, required=not bundled)
        @functools.wraps(command)
        def wrapper(**kwargs: Any) -> None:
            from tinystories.hub.client import resolve_model_folder

            kwargs[name] = resolve_model_folder(kwargs[name])
            command(**kwargs)

        return wrapper

    return decorator


def engine_option(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add --engine, explained by `help_text`: what `auto` selects depends on the command."""
    choice = click.Choice(["auto", "cpu", "torch"])
    return click.option("--engine", type=choice, default="auto", show_default=True, help=help_text)


device_option = click.option(
    "--device", default="auto", show_default=True, help="Device of the torch engine: auto, cpu, cuda, cuda:1, mps."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISION_CHOICES),
    default="auto",
    show_default=True,
    help="Weight precision. cpu: int8 (auto), int4 or fp32; torch: bf16 if the hardware supports it, else fp32 (auto).",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of the CPU engine.  [default: number of cores, at most 16]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")

SAMPLING_OPTIONS = (
    click.option("--temperature", type=float, help="Randomness of sampling (0: greedy, always the most likely token)."),
    click.option("--top-k", type=int, help="Sample from the K most likely tokens (0: off)."),
    click.option(
        "--top-p", type=float, help="Sample from the most likely tokens that add up to probability P (1: off)."
    ),
    click.option(
        "--min-p", type=float, help="Drop tokens less than P times as likely as the most likely one (0: off)."
    ),
    click.option(
        "--repetition-penalty", type=float, help="Values above 1 make tokens already used less likely (1: off)."
    ),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of `SamplingConfig`; an option that is not given is None."""
    for option in reversed(SAMPLING_OPTIONS):
        command = option(command)
    return command


def run(command: click.Command, argv: list[str] | None = None, name: str = "tinystories") -> int:
    """Run a command and return its exit code.

    Errors that the user can fix become one line on stderr; anything else is a bug and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for logger_name in ("httpx", "httpx2"):
        logging.getLogger(logger_name).setLevel(logging.WARNING)
    escape_unencodable_characters()
    original_stdout = sys.stdout
    try:
        result = command.main(argv, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        if claim_error_message(str(error)):
            rank = os.environ.get("RANK", "0")
            click.echo(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", err=True)
        return 2
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command_path = context.command_path if context else name
        click.echo(f"error: {error.format_message()} (see {command_path} --help)", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except SystemExit:
        if sys.stdout is original_stdout:
            raise
        discard_stdout()  # the reader of a pipe has gone, as after `| head`: click replaces sys.stdout and exits
        return 0
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        discard_stdout()
        click.echo(f"error: {describe_write_error(error, 'the output')}", err=True)
        return 1
    except ModuleNotFoundError as error:
        click.echo(f"error: {error.name} is not installed; {TRAIN_EXTRA_HINT}", err=True)
        return 2


def escape_unencodable_characters() -> None:
    """Print characters that the encoding of stdout or stderr does not have as escapes such as \\U0001f98a.

    Python would raise UnicodeEncodeError in the middle of a story: in code page 1252 on Windows, in Latin-1 or ASCII
    locales, and for file names that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if a caller has replaced it by another object, or by None
            stream.reconfigure(errors="backslashreplace")


def discard_stdout() -> None:
    """Redirect stdout to the null device, so that flushing its buffer at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
