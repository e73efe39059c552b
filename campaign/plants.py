"""Planted faults: `python -m campaign.plants NAME ARGUMENTS...` runs the command line with a fault to be reported."""

import contextlib
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from campaign import internals


def replace(name: str, make: Callable[[Any], Any]) -> None:
    """Replace an internal by `make(original)`, before any other module has imported it."""
    module, attribute, original = internals.resolve(name)
    setattr(module, attribute, make(original))


def fail_on_bad_input(fault: Callable[[], object]) -> None:
    """Call `fault` instead of reporting a malformed JSON or TOML file."""

    def make(original: Any) -> Any:
        def read(path: Path) -> Any:
            from tinystories import UserError

            try:
                return original(path)
            except UserError:
                fault()
                raise

        return read

    replace(internals.READ_JSON_OBJECT, make)
    original_loads = tomllib.loads

    def loads(text: str) -> Any:
        try:
            return original_loads(text)
        except ValueError:
            fault()
            raise

    tomllib.loads = loads  # type: ignore[assignment]


def raise_key_error() -> None:
    raise KeyError("planted")


def write_files_in_place() -> None:
    """Write files and folders under their final names, and leave what is there after a failure."""

    @contextlib.contextmanager
    def atomic_file(path: Path, **_: object) -> Iterator[BinaryIO]:
        with path.open("wb") as file:
            yield file

    @contextlib.contextmanager
    def atomic_directory(target: Path, staging: Path | None = None) -> Iterator[Path]:  # noqa: ARG001
        target.mkdir(parents=True, exist_ok=True)
        yield target

    replace(internals.ATOMIC_FILE, lambda _: atomic_file)
    replace(internals.ATOMIC_DIRECTORY, lambda _: atomic_directory)


def leave_drafts() -> None:
    """Never clean up: each atomic write leaves a second copy beside the file."""

    def make(original: Any) -> Any:
        @contextlib.contextmanager
        def atomic_file(path: Path, **options: Any) -> Iterator[BinaryIO]:
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(b"draft")
            with original(path, **options) as file:
                yield file

        return atomic_file

    replace(internals.ATOMIC_FILE, make)


def forget_optimizer_state() -> None:
    """Resume with moments of zero."""
    from safetensors import torch as library

    original = library.load_file

    def load_file(path: Any, *args: Any, **options: Any) -> Any:
        tensors = original(path, *args, **options)
        if "optimizer" in str(path):
            tensors = {name: tensor.zero_() for name, tensor in tensors.items()}
        return tensors

    library.load_file = load_file


def ignore_sigterm() -> None:
    """Ignore SIGTERM, whatever handler is installed later."""
    original = signal.signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def install(number: int, handler: Any) -> Any:
        return signal.SIG_IGN if number == signal.SIGTERM else original(number, handler)

    signal.signal = install  # type: ignore[assignment]


def raise_on_unwritable() -> None:
    """Turn every failure to write a file into an exception that nobody expects."""

    def make(original: Any) -> Any:
        @contextlib.contextmanager
        def atomic_file(path: Path, **options: Any) -> Iterator[BinaryIO]:
            try:
                with original(path, **options) as file:
                    yield file
            except OSError as error:
                raise RuntimeError("planted") from error

        return atomic_file

    replace(internals.ATOMIC_FILE, make)


def stop_preparing() -> None:
    """Interrupt `prepare` after a few batches, each of which is in the journal."""
    _, _, staging_dir = internals.resolve(internals.STAGING_DIR)
    save, calls = staging_dir.save, iter(range(1 << 30))

    def save_or_stop(self: Any, **_: Any) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        save(self, now=True)

    staging_dir.save = save_or_stop


PLANTS: dict[str, Callable[[], object]] = {
    "reader-raises": lambda: fail_on_bad_input(raise_key_error),
    "reader-crashes": lambda: fail_on_bad_input(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "reader-hangs": lambda: fail_on_bad_input(lambda: time.sleep(3600)),
    "reader-exhausts-memory": lambda: fail_on_bad_input(lambda: bytearray(1 << 40)),
    "not-atomic": write_files_in_place,
    "lost-state": forget_optimizer_state,
    "deaf": ignore_sigterm,
    "interrupted": stop_preparing,
    "unwritable": raise_on_unwritable,
    "drafts": leave_drafts,
}


if __name__ == "__main__":
    PLANTS[sys.argv[1]]()
    from tinystories.cli import main

    main(sys.argv[2:])
