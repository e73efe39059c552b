"""Check a `torch.save` file before torch opens it: no compression, and a pickle that builds nothing but tensors.

torch's `weights_only=True` runs no code, but a small hostile file could still make it exhaust memory.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from tinystories.errors import UserError, quoted

MAX_PICKLE_BYTES = 64_000_000  # the pickle holds names and shapes; the numbers are stored outside it
# Parts of one value, counting shared ones each time: nested sharing can make a tiny pickle exponentially large.
MAX_PARTS = 10_000_000
# Globals that a state dict refers to, as "module name", the form in which pickletools reports them.
ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch ([A-Z][a-z0-9A-Z]*Storage|Size|device|bool|(b?float|complex|u?int)\d+(_\w+)?)"
    r"|torch\.storage UntypedStorage"
)
FORBIDDEN_OPCODES = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID")


def check_pickle(path: Path) -> None:
    """Raise `UserError` unless the file is a zip archive as torch writes it, whose pickle refers only to tensor types.

    Nothing is unpickled or run, and memory use is bounded by the size of the file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or not a regular file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not a valid file of tensors: it is truncated, from torch before 1.6, or not from torch; save it"
            " again with torch.save(model.state_dict(), ...)"
        )
    try:
        pickle_bytes = read_pickle(path)
        check_opcodes(pickle_bytes, path)
    except UserError:
        raise
    except Exception:  # from zipfile or pickletools: a hostile file may cause any
        raise UserError(f"{path} is not a valid file of tensors: it is damaged; copy it again") from None


def read_pickle(path: Path) -> bytes:
    """Return data.pkl of the archive; `UserError` if the archive could expand to more bytes than the file has."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise UserError(
                f"{path} is not a valid file of tensors: parts of it are compressed, which torch never does"
            )
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is not a valid file of tensors: its entries claim more bytes than the file has")
        names = [entry.filename for entry in entries]
        pickles = [entry for entry in entries if re.fullmatch(r"([^/]+/)?data\.pkl", entry.filename)]
        if len(pickles) != 1 or len(set(names)) < len(names) or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path} is not a valid file of tensors: data.pkl is missing, duplicated or too large")
        return archive.read(pickles[0])


def check_opcodes(pickle_bytes: bytes, path: Path) -> None:
    """Interpret the pickle symbolically: instead of values, the stack holds the number of parts that each would have.

    `UserError` for globals outside ALLOWED_GLOBALS, for opcodes that torch does not write, and for values that would
    have more than MAX_PARTS parts.
    """
    mark = pickletools.markobject
    stack: list[Any] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(pickle_bytes):
        if opcode.name == "GLOBAL" and not ALLOWED_GLOBALS.fullmatch(str(argument)):
            raise UserError(
                f"{path} is not a valid file of tensors: it contains {quoted(str(argument).replace(' ', '.'))};"
                " save only the weights: torch.save(model.state_dict(), ...)"
            )
        if opcode.name in FORBIDDEN_OPCODES:
            raise UserError(
                f"{path} is not a valid file of tensors: its pickle uses {opcode.name}, which torch does not write"
            )
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
            continue
        # Any other opcode pops its arguments and pushes its results; a result has the parts of all arguments, plus one.
        n_parts = 1
        stack_before = opcode.stack_before
        if mark in stack_before:
            while (top := stack.pop()) is not mark:
                n_parts += top
            stack_before = stack_before[: stack_before.index(mark)]
        for _ in stack_before:
            n_parts += stack.pop()
        if n_parts > MAX_PARTS:
            raise UserError(f"{path} is not a valid file of tensors: a value in it has more than {MAX_PARTS:,} parts")
        stack += [mark if item is mark else n_parts for item in opcode.stack_after]
