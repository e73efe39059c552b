"""Models of other programs as model directories. Every file is taken to be hostile until it has been checked."""

from pathlib import Path

from tinystories.checkpoint import is_ours
from tinystories.errors import UserError
from tinystories.interop import gguf, hf_folder, hub, llama2c, original
from tinystories.interop.portable import Portable


def import_model(source: str, tokenizer: Path | None = None) -> Portable:
    """Read a Hugging Face directory (or hf:OWNER/NAME), a GGUF file, a llama2.c checkpoint or a .pt of the original.

    `tokenizer`: a tokenizer.json or llama2.c's tokenizer.bin, where the source brings none. `UserError` where it is
    none of these, is damaged, or holds what our architectures cannot.
    """
    path = hub.download(source) if source.startswith("hf:") else Path(source)
    if path.is_dir():
        return read_folder(path, tokenizer)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
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
    weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf")]
    if len(weights) == 1 and weights[0].suffix == ".gguf":
        return gguf.read(weights[0], tokenizer)
    return hf_folder.read(path, tokenizer)
