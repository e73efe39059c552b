"""Models of other programs as model directories. Every file is taken to be hostile until it has been checked."""

import os
import stat
from pathlib import Path

from tinystories.checkpoint import is_model, is_native_model
from tinystories.errors import UserError, error_context, os_errors
from tinystories.interop import gguf, hf_folder, hub, llama2c, state_dict
from tinystories.interop.destination import check_destination, translate_write_errors
from tinystories.interop.model_bundle import ModelBundle


def import_to_directory(source: str, out: Path, tokenizer: Path | None = None, *, force: bool = False) -> ModelBundle:
    """Write the model of `import_model` as the model directory `out`, whole or not at all. See `require_place`."""
    is_local = not source.startswith("hf:")
    with translate_write_errors(out):
        check_destination(out, is_folder=True, force=force, source=Path(source) if is_local else None)
    model = import_model(source, tokenizer)
    with error_context(resolve_path(source) if is_local else source):
        model.check()
    with translate_write_errors(out):
        model.write(out)
    return model


def resolve_path(source: str) -> Path:
    """The path, from the root where it has no name of its own, such as "."."""
    return Path(os.path.realpath(source)) if Path(source).name in ("", "..") else Path(source)


def import_model(source: str, tokenizer: Path | None = None) -> ModelBundle:
    """Read a Hugging Face directory (or hf:OWNER/NAME), a GGUF file, a llama2.c checkpoint or a .pt of the original.

    `tokenizer`: a tokenizer.json, a folder that has one, or llama2.c's tokenizer.bin, in place of the source's own.
    `UserError` where it is none of these, is damaged, or holds what our architectures cannot.
    """
    path = hub.download(source) if source.startswith("hf:") else resolve_path(source)
    with os_errors("--tokenizer"):
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        if tokenizer is not None and not tokenizer.is_file():
            raise UserError(
                f"--tokenizer {tokenizer}: no such file; name a tokenizer.json, or llama2.c's tokenizer.bin"
            )
    with os_errors(path):
        file_mode = path.stat().st_mode
        if stat.S_ISDIR(file_mode):
            return read_folder(path, tokenizer)
        if not stat.S_ISREG(file_mode):
            raise UserError(f"{path} is neither a file nor a directory")
        with path.open("rb") as file:
            header = file.read(8)
    if header.startswith(b"GGUF"):
        return gguf.read(path, tokenizer)
    if header.startswith(b"PK") or path.suffix in (".pt", ".pth", ".ckpt"):
        return state_dict.read(path, tokenizer)
    if path.suffix == ".bin":
        return llama2c.read(path, tokenizer)
    raise UserError(
        f"{path} is not known: expected a Hugging Face folder, a .gguf, a llama2.c .bin, or a .pt of the original"
    )


def read_folder(path: Path, tokenizer: Path | None) -> ModelBundle:
    """A model directory of ours, a folder that holds nothing but one GGUF file, or one of Hugging Face."""
    if is_native_model(path):
        if tokenizer is not None:
            raise UserError(f"{path} is a model directory, which has a tokenizer; leave --tokenizer out")
        return ModelBundle.read(path)
    weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file()]
    if len(weights) == 1 and weights[0].suffix == ".gguf":
        return gguf.read(weights[0], tokenizer)
    if not is_model(path):
        raise UserError(f"{path} holds no model: there is neither a config.json nor one GGUF file alone")
    return hf_folder.read(path, tokenizer)
