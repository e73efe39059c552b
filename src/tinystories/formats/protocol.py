"""The interface of every format: one `Format` object reads, writes and verifies it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.errors import UserError
from tinystories.formats.bundle import Array, ModelBundle

FP32_TOLERANCE = 1e-4  # largest accepted difference of fp32 logits (see `max_logit_difference`)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A file format of another program. `read` is None if it cannot be imported, `write` if it cannot be exported.

    `can_read(path)`: whether an existing file or directory is of this format, judged by its name and first bytes.
    `read(path, tokenizer)`: `tokenizer`, if given, is a file that replaces the model's own, or `gpt2`.
    `write(model, path, precision)` writes the file, and none, some or all of `sidecars(path)` beside it. If it
    renumbers ids, it returns the permutation: file id = permutation[our id].
    `logits(path, ids)` reads the file the way its users will and returns (T, V) logits.
    `check(model, path)`, instead of `logits` for files that are programs: run the file, compare the ids that it
    generates with the engine's, and return what was compared, or None if nothing on this machine can run it.
    `max_divergence`: for each precision (the first is the default) the largest accepted mean KL divergence, in nats, of
    the file's predictions from the model's; 0 means that logits must agree to FP32_TOLERANCE instead.
    `next_steps(path)`: a message that tells the user how to run the file.
    `is_folder`: whether an export is a directory.
    """

    name: str
    can_read: Callable[[Path], bool] = lambda _: False
    read: Callable[[Path, Path | None], ModelBundle] | None = None
    write: Callable[[ModelBundle, Path, str], Array | None] | None = None
    logits: Callable[[Path, list[int]], Array] | None = None
    check: Callable[[ModelBundle, Path], str | None] | None = None
    max_divergence: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sidecars: Callable[[Path], list[Path]] = lambda _: []
    next_steps: Callable[[Path], str] = lambda _: ""
    is_folder: bool = False


def max_logit_difference(logits: Array, expected: Array) -> float:
    """Return the largest difference; divided by a tenth of the largest expected logit if that exceeds 10."""
    return float(np.abs(logits - expected).max() / max(1, np.abs(expected).max() / 10))


def starts_with(path: Path, magic: bytes) -> bool:
    """Return whether `path` is a file that begins with `magic`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def import_package(name: str, what: str) -> Any:
    """Import a package of the extra [export]; `UserError` that `what` needs it if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{what} needs {name}: pip install "tinystories-gpt[export]"') from None
