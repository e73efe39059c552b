"""Models of other programs as model directories. Every file is taken to be hostile until it has been checked."""

from pathlib import Path

from tinystories.errors import UserError
from tinystories.interop import gguf, hf_folder, hub, llama2c, original
from tinystories.interop.portable import Portable


def import_model(source: str, tokenizer: Path | None = None) -> Portable:
    """Read a Hugging Face directory (or hf:OWNER/NAME), a GGUF file, a llama2.c checkpoint or a .pt of the original.

    `tokenizer`: a tokenizer.json or llama2.c's tokenizer.bin, where the source brings none. `UserError` where it is
    none of these, is damaged, or holds what our architectures cannot.
    """
    if source.startswith("hf:"):
        return hf_folder.read(hub.download(source), tokenizer)
    path = Path(source)
    if path.is_dir():
        return hf_folder.read(path, tokenizer)
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
        f"{path} is not known: expected a Hugging Face folder, a .gguf, a llama2.c .bin or a .pt of the original program"
    )
