"""Models of other programs as model directories. Every file is taken to be hostile until it has been checked."""

import os
import stat
from pathlib import Path

from tinystories.checkpoint import is_model, is_ours
from tinystories.errors import UserError, naming, reading
from tinystories.interop import gguf, hf_folder, hub, llama2c, original
from tinystories.interop.place import require_place, writing
from tinystories.interop.portable import Portable


def convert(source: str, out: Path, tokenizer: Path | None = None, *, force: bool = False) -> Portable:
    """Write the model of `import_model` as the model directory `out`, whole or not at all. See `require_place`."""
    is_local = not source.startswith("hf:")
    with writing(out):
        require_place(out, folder=True, force=force, source=Path(source) if is_local else None)
    model = import_model(source, tokenizer)
    with naming(with_name(source) if is_local else source):
        model.check()
    with writing(out):
        model.write(out)
    return model


def with_name(source: str) -> Path:
    """The path, from the root where it has no name of its own, such as "."."""
    return Path(os.path.realpath(source)) if Path(source).name in ("", "..") else Path(source)


def import_model(source: str, tokenizer: Path | None = None) -> Portable:
    """Read a Hugging Face directory (or hf:OWNER/NAME), a GGUF file, a llama2.c checkpoint or a .pt of the original.

    `tokenizer`: a tokenizer.json, a folder that has one, or llama2.c's tokenizer.bin, in place of the source's own.
    `UserError` where it is none of these, is damaged, or holds what our architectures cannot.
    """
    path = hub.download(source) if source.startswith("hf:") else with_name(source)
    with reading("--tokenizer"):
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        if tokenizer is not None and not tokenizer.is_file():
            raise UserError(
                f"--tokenizer {tokenizer}: no such file; name a tokenizer.json, or llama2.c's tokenizer.bin"
            )
    with reading(path):
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return read_folder(path, tokenizer)
        if not stat.S_ISREG(kind):
            raise UserError(f"{path} is neither a file nor a directory")
        with path.open("rb") as file:
            start = file.read(8)
    if start.startswith(b"GGUF"):
        return gguf.read(path, tokenizer)
    if start.startswith(b"PK") or path.suffix in (".pt", ".pth", ".ckpt"):
        return original.read(path, tokenizer)
    if path.suffix == ".bin":
        return llama2c.read(path, tokenizer)
    raise UserError(
        f"{path} is not known: expected a Hugging Face folder, a .gguf, a llama2.c .bin, or a .pt of the original"
    )


def read_folder(path: Path, tokenizer: Path | None) -> Portable:
    """A model directory of ours, a folder that holds nothing but one GGUF file, or one of Hugging Face."""
    if is_ours(path):
        if tokenizer is not None:
            raise UserError(f"{path} is a model directory, which has a tokenizer; leave --tokenizer out")
        return Portable.read(path)
    weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file()]
    if len(weights) == 1 and weights[0].suffix == ".gguf":
        return gguf.read(weights[0], tokenizer)
    if not is_model(path):
        raise UserError(f"{path} holds no model: there is neither a config.json nor one GGUF file alone")
    return hf_folder.read(path, tokenizer)
