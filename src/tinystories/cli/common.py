"""Run a command so that errors become one line on stderr and an exit code; options that several commands share."""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

from tinystories.config import SamplingConfig
from tinystories.engine.engine_config import ENGINE_PRECISIONS, ENGINES, EngineConfig
from tinystories.errors import UserError, one_line
from tinystories.files import describe_disk_error
from tinystories.train.distributed import claim_error_message

Command: TypeAlias = Callable[..., Any]
Decorator: TypeAlias = Callable[[Command], Command]

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
TRAIN_EXTRA_HINT = 'this command needs more packages; install them with: pip install "tinystories-gpt[train]"'
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)  # in PyTorch's messages
MAX_REASON_CHARS = 200
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

errors_option = click.option(
    "--errors",
    type=click.Choice(["strict", "replace"]),
    default="strict",
    help="Bytes that are not valid UTF-8: stop (strict) or replace them with U+FFFD (replace).",
)
# For a command that prints either text or JSON; a command that does more than that has `json_option`.
json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, the rest on stderr.")


def json_option(command: Command) -> Command:
    """Add --json to a command that returns its result as a dict, or an exit code if it has none.

    With --json, stdout gets the dict as one JSON object, and whatever else the command prints goes to stderr.
    """

    @json_flag
    @functools.wraps(command)
    def wrapper(*, as_json: bool, **kwargs: Any) -> int:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = command(**kwargs)
        if isinstance(result, int):
            return result
        if as_json:
            click.echo(json.dumps(result, default=str))
        return 0

    return wrapper


def add_options(*options: Decorator) -> Decorator:
    """Return a decorator that adds several options; --help lists them in this order."""

    def decorator(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorator


def model_argument(*, bundled: bool = False) -> Decorator:
    """Add the argument MODEL, a directory or hf:OWNER/NAME[@REVISION]; the command receives the directory.

    A model on the Hub is downloaded only after all options have been parsed. With `bundled`, MODEL is optional and
    defaults to the bundled storyteller.
    """

    def decorator(command: Command) -> Command:
        @click.argument("model", required=not bundled)
        @functools.wraps(command)
        def wrapper(*, model: str | None, **kwargs: Any) -> Any:
            from tinystories.hub.client import resolve_model_folder

            return command(model=resolve_model_folder(model), **kwargs)

        return wrapper

    return decorator


def engine_options(engine_help: str, precision_help: str) -> Decorator:
    """Add --engine, --device, --precision and --threads; the command receives an `EngineConfig` as `engine_config`.

    What `auto` selects depends on the command, so it passes the help of --engine and --precision.
    """

    def decorator(command: Command) -> Command:
        @click.option("--engine", type=click.Choice(ENGINES), default="auto", help=engine_help)
        @click.option("--device", default="auto", help="Device of the torch engine: auto, cpu, cuda, cuda:1, mps.")
        @click.option("--precision", type=click.Choice(ENGINE_PRECISIONS), default="auto", help=precision_help)
        @click.option(
            "--threads",
            type=click.IntRange(min=1),
            help="Threads of the CPU engine.  [default: number of cores, at most 16; one where more do not help]",
        )
        @functools.wraps(command)
        def wrapper(*, engine: str, device: str, precision: str, threads: int | None, **kwargs: Any) -> Any:
            engine_config = EngineConfig(engine=engine, device=device, precision=precision, threads=threads)
            return command(engine_config=engine_config, **kwargs)

        return wrapper

    return decorator


def sampling_options(command: Command) -> Command:
    """Add an option for each field of `SamplingConfig`; the command receives those given as the dict `sampling`."""

    @click.option("--temperature", type=float, help="Randomness of sampling (0: greedy, always the most likely token).")
    @click.option("--top-k", type=int, help="Sample from the K most likely tokens (0: off).")
    @click.option(
        "--top-p", type=float, help="Sample from the most likely tokens that add up to probability P (1: off)."
    )
    @click.option(
        "--min-p", type=float, help="Drop tokens less than P times as likely as the most likely one (0: off)."
    )
    @click.option(
        "--repetition-penalty", type=float, help="Values above 1 make tokens already used less likely (1: off)."
    )
    @click.option(
        "--repetition-window", type=int, help="Tokens that the repetition penalty looks back (0: the whole story)."
    )
    @click.option(
        "--penalize-names/--spare-names",
        default=None,
        help="Whether the repetition penalty applies to capitalized words and to tokens that continue a word.",
    )
    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        values = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(SamplingConfig)}
        return command(sampling={name: value for name, value in values.items() if value is not None}, **kwargs)

    return wrapper


def run(command: click.Command, argv: list[str] | None = None, name: str = "tinystories") -> int:
    """Run a command and return its exit code.

    Errors that the user can fix become one line on stderr; anything else is a bug and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for logger_name in ("httpx", "httpx2", "matplotlib"):
        logging.getLogger(logger_name).setLevel(logging.WARNING)
    escape_unencodable_characters()
    original_stdout = sys.stdout
    try:
        result = command.main(argv, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        if claim_error_message(str(error)):
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" else f"rank {rank}: "
            click.echo(f"error: {who}{error}", err=True)
        return 2
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command_path = context.command_path if context else name
        click.echo(f"error: {one_line(error.format_message())} (see {command_path} --help)", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except SystemExit:
        if sys.stdout is original_stdout:
            raise
        discard_stdout()  # the reader of a pipe has gone, as after `| head`: click replaces sys.stdout and exits
        return 0
    except ModuleNotFoundError as error:
        click.echo(f"error: {error.name} is not installed; {TRAIN_EXTRA_HINT}", err=True)
        return 2
    except Exception as error:
        if is_interrupt(error):
            click.echo("stopped", err=True)
            return 130
        if (message := describe_memory_error(error)) is not None:
            click.echo(f"error: {message}", err=True)
            return 2
        if (message := describe_disk_error(error)) is None:
            raise
        is_stdout = discard_stdout_if_full()
        click.echo(f"error: {one_line(message)}", err=True)
        return 1 if is_stdout else 2


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error.

    Python makes a RuntimeError of what `__set_name__` raises, which PyTorch's import calls.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def describe_memory_error(error: Exception) -> str | None:
    """Return one line for memory that Python, NumPy or PyTorch could not get; None if the error is something else."""
    is_torch_error = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    if not isinstance(error, MemoryError) and not is_torch_error:
        return None
    reason = one_line(error)[:MAX_REASON_CHARS]
    return f"not enough memory{reason and f' ({reason})'}; use a smaller model or batch, or close other programs"


def escape_unencodable_characters() -> None:
    """Print characters that the encoding of stdout or stderr does not have as escapes such as \\U0001f98a.

    Python would raise UnicodeEncodeError in the middle of a story: in code page 1252 on Windows, in Latin-1 or ASCII
    locales, and for file names that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if a caller has replaced it by another object, or by None
            stream.reconfigure(errors="backslashreplace")


def discard_stdout_if_full() -> bool:
    """Return whether stdout itself cannot be written (`> /dev/full`); what it has buffered is then discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()
        return True
    return False


def discard_stdout() -> None:
    """Redirect stdout to the null device, so that flushing its buffer at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
