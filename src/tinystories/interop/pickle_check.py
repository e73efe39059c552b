"""What a file of `torch.save` holds, looked at before torch opens it: nothing that grows, nothing but tensors."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from tinystories.errors import UserError, quoted

MAX_PICKLE_BYTES = 64_000_000  # bytes: names and shapes, no numbers
MAX_PARTS = 10_000_000  # of one value, when all that it shares is counted each time
# What a state dict refers to: "module name", as the pickle has it.
ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch ([A-Z][a-z0-9A-Z]*Storage|Size|device|bool|(b?float|complex|u?int)\d+(_\w+)?)"
    r"|torch\.storage UntypedStorage"
)
FORBIDDEN_OPCODES = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID")


def check_pickle(path: Path) -> None:
    """`UserError` unless the file is a zip archive as torch writes it, whose pickle names only parts of tensors.

    Nothing is unpacked or run; the memory taken is that of the file's own bytes.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not a whole file of tensors: it is cut short, of torch before 1.6, or no file of torch's;"
            " save it anew: torch.save(model.state_dict(), ...)"
        )
    try:
        pickle_bytes = read_pickle(path)
        check_opcodes(pickle_bytes, path)
    except UserError:
        raise
    except Exception:  # of zipfile, pickletools: a hostile file may lead to any
        raise UserError(f"{path} is not a whole file of tensors: it is damaged; copy it again") from None


def read_pickle(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise UserError(
                f"{path} is not a whole file of tensors: parts of it are compressed, which torch never does"
            )
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is not a whole file of tensors: its parts are larger than itself")
        names = [entry.filename for entry in entries]
        pickles = [entry for entry in entries if re.fullmatch(r"([^/]+/)?data\.pkl", entry.filename)]
        if len(pickles) != 1 or len(set(names)) < len(names) or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path} is not a whole file of tensors: it has none or several data.pkl, or one too large")
        return archive.read(pickles[0])


def check_opcodes(pickle_bytes: bytes, path: Path) -> None:
    """Follows the stack by sizes alone: how many parts each value on it has."""
    mark = pickletools.markobject
    stack: list[Any] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(pickle_bytes):
        if opcode.name == "GLOBAL" and not ALLOWED_GLOBALS.fullmatch(str(argument)):
            raise UserError(
                f"{path} is not a whole file of tensors: it holds {quoted(str(argument).replace(' ', '.'))};"
                " save the weights alone: torch.save(model.state_dict(), ...)"
            )
        if opcode.name in FORBIDDEN_OPCODES:
            raise UserError(f"{path} is not a whole file of tensors: its pickle uses {opcode.name}, torch's does not")
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
            continue
        n_parts = 1
        stack_before = opcode.stack_before
        if mark in stack_before:
            while (top := stack.pop()) is not mark:
                n_parts += top
            stack_before = stack_before[: stack_before.index(mark)]
        for _ in stack_before:
            n_parts += stack.pop()
        if n_parts > MAX_PARTS:
            raise UserError(f"{path} is not a whole file of tensors: a value in it has more than {MAX_PARTS:,} parts")
        stack += [mark if item is mark else n_parts for item in opcode.stack_after]
