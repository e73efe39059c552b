"""Read the state dict of a `torch.save` file, once it is found to build nothing but tensors.

This is the only module that opens a pickle. torch's `weights_only=True` runs no code, but a small hostile file could
still make it exhaust memory.
"""

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.errors import UserError, quoted

if TYPE_CHECKING:
    from torch import Tensor

STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")  # keys under which a checkpoint stores its state dict
CONFIG_KEYS = ("model_args", "config", "hparams")  # keys under which it stores its sizes; nanoGPT uses the first
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


def load_state_dict(path: Path) -> tuple[dict[str, "Tensor"], Mapping[str, Any]]:
    """Return the memory-mapped state dict and the hyperparameters stored with it, if any. Runs no code of the file.

    `UserError` if torch is missing, or the file is damaged, hostile, or not a state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs PyTorch: pip install 'tinystories-gpt[train]'") from None
    check_pickle(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a hostile file may cause any
        raise UserError(
            f"{path} is not a valid file of tensors: torch cannot read it; copy it again, or save it again with"
            " torch.save(model.state_dict(), ...)"
        ) from None
    hyperparameters: Mapping[str, Any] = {}
    if isinstance(content, dict):
        hyperparameters = next((content[key] for key in CONFIG_KEYS if isinstance(content.get(key), dict)), {})
        content = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} contains no state dict; save one with torch.save(model.state_dict(), ...)")
    byte_budget = 2 * path.stat().st_size  # twice, since a tied LM head shares storage with the embedding
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: {quoted(name)} is not a tensor; save only the weights: torch.save(model.state_dict(), ...)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {quoted(name)} is not a dense, unquantized CPU tensor; convert it and save again")
        byte_budget -= tensor.numel() * tensor.element_size()
        if byte_budget < 0:  # many views of the same small storage, e.g. by expand()
            raise UserError(f"{path}: {quoted(name)} of shape {quoted(tuple(tensor.shape))} is larger than the file")
    return content, hyperparameters


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
