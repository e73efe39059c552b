"""What a file of `torch.save` holds, looked at before torch opens it: nothing that grows, nothing but tensors."""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from tinystories.errors import UserError, shown

MOST_PICKLE = 64_000_000  # bytes: names and shapes, no numbers
MOST_PARTS = 10_000_000  # of one value, when all that it shares is counted each time
# What a state dict refers to: "module name", as the pickle has it.
PLAIN = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)"
    r"|torch ([A-Z][a-z0-9A-Z]*Storage|Size|device|bool|(b?float|complex|u?int)\d+(_\w+)?)"
    r"|torch\.storage UntypedStorage"
)
UNKNOWN_TO_TORCH = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID")


def require_plain(path: Path) -> None:
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
        program = pickle_of(path)
        require_tensors(program, path)
    except UserError:
        raise
    except Exception:  # of zipfile, pickletools: a hostile file may lead to any
        raise UserError(f"{path} is not a whole file of tensors: it is damaged; copy it again") from None


def pickle_of(path: Path) -> bytes:
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
        if len(pickles) != 1 or len(set(names)) < len(names) or pickles[0].file_size > MOST_PICKLE:
            raise UserError(f"{path} is not a whole file of tensors: it has none or several data.pkl, or one too large")
        return archive.read(pickles[0])


def require_tensors(program: bytes, path: Path) -> None:
    """Follows the stack by sizes alone: how many parts each value on it has."""
    mark = pickletools.markobject
    stack: list[Any] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and not PLAIN.fullmatch(str(argument)):
            raise UserError(
                f"{path} is not a whole file of tensors: it holds {shown(str(argument).replace(' ', '.'))};"
                " save the weights alone: torch.save(model.state_dict(), ...)"
            )
        if opcode.name in UNKNOWN_TO_TORCH:
            raise UserError(f"{path} is not a whole file of tensors: its pickle uses {opcode.name}, torch's does not")
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
            continue
        taken = 1
        before = opcode.stack_before
        if mark in before:
            while (top := stack.pop()) is not mark:
                taken += top
            before = before[: before.index(mark)]
        for _ in before:
            taken += stack.pop()
        if taken > MOST_PARTS:
            raise UserError(f"{path} is not a whole file of tensors: a value in it has more than {MOST_PARTS:,} parts")
        stack += [mark if what is mark else taken for what in opcode.stack_after]
