"""Read PyTorch files (.pt, .pth, pytorch_model.bin). Runs no code of the file.

This is the only module that opens a pickle. torch's `weights_only=True` runs no code, but some of the functions that it
allows can make a small file exhaust memory, so the file is first found to have no other parts than tensors and plain
values, and none that expands.
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
FLOAT_TYPES = {f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")}  # that weights may have
MAX_PICKLE_BYTES = 64_000_000  # the pickle holds names and shapes; the numbers are stored outside it
# Globals that a state dict refers to, as "module name", the form in which pickletools reports them.
ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|torch\.storage UntypedStorage"
    r"|torch ([A-Z][a-z0-9A-Z]*Storage|Size|device|bool|(b?float|complex|u?int)\d+(_\w+)?)"
)


def load_state_dict(path: Path) -> tuple[dict[str, "Tensor"], Mapping[str, Any]]:
    """Return the memory-mapped state dict and the hyperparameters stored with it, if any. Runs no code of the file.

    `UserError` if torch is missing, or the file is damaged, hostile, or not a state dict.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs PyTorch: pip install 'tinystories-gpt[train]'") from None
    try:
        problem = find_problem(path)
        content = None if problem else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # from zipfile, pickletools or torch: a hostile file may cause any
        problem = "it is damaged, or from torch before 1.6"
    if problem:
        advice = "copy it again, or save it again with torch.save(model.state_dict(), ...)"
        raise UserError(f"{path} is not a valid file of tensors: {problem}; {advice}")
    hyperparameters: Mapping[str, Any] = {}
    if isinstance(content, dict):
        hyperparameters = next((content[key] for key in CONFIG_KEYS if isinstance(content.get(key), dict)), {})
        content = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} contains no state dict; save one with torch.save(model.state_dict(), ...)")
    byte_budget = 2 * path.stat().st_size  # twice, since a tied LM head shares storage with the embedding
    for name, tensor in content.items():
        if not isinstance(name, str):  # not quoted: shared parts can make its repr exponentially large
            raise UserError(f"{path}: a key is not the name of a tensor; use torch.save(model.state_dict(), ...)")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: {quoted(name)} is not a tensor; save only the weights: torch.save(model.state_dict(), ...)"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UserError(f"{path}: {quoted(name)} is not a dense, unquantized CPU tensor; convert it and save again")
        byte_budget -= tensor.numel() * tensor.element_size()
        if byte_budget < 0:  # many views of the same small storage, e.g. by expand()
            raise UserError(f"{path}: {quoted(name)} of shape {quoted(tuple(tensor.shape))} is larger than the file")
    return content, hyperparameters


def find_problem(path: Path) -> str:
    """Return why loading the file could take more memory than a multiple of its size; "" if it cannot.

    Unpickles and runs nothing. May raise any exception for a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "parts of it are compressed, which torch never does"
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            return "its entries claim more bytes than the file has"
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            return "data.pkl is missing, duplicated or too large"
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL" and not ALLOWED_GLOBALS.fullmatch(str(argument)):
                return f"it contains {quoted(str(argument).replace(' ', '.'))}"
    return ""
