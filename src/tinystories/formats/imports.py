"""Import models of other programs as model directories. Every file is treated as hostile until it has been checked."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from tinystories.checkpoint import is_model, is_native_model
from tinystories.errors import UserError, error_context
from tinystories.files import os_errors
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.destination import check_destination, translate_write_errors
from tinystories.formats.gguf import format as gguf
from tinystories.formats.hf import format as hf_folder
from tinystories.formats.llama2c import format as llama2c
from tinystories.formats.pt import format as state_dict


def import_to_directory(
    source: str,
    out: Path,
    tokenizer: Path | None = None,
    *,
    force: bool = False,
    download: Callable[[str], Path] | None = None,
) -> ModelBundle:
    """Import `source` (see `import_model`), write it atomically as the model directory `out`, and return it.

    `download` turns hf:OWNER/NAME into a local folder, once `out` is known to be writable. `UserError` if the source
    cannot be read or `out` must not be replaced (see `check_destination`).
    """
    is_local = not source.startswith("hf:") or download is None
    with translate_write_errors(out):
        check_destination(out, is_folder=True, force=force, source=Path(source) if is_local else None)
    path = source if is_local or download is None else str(download(source))
    model = import_model(path, tokenizer)
    with error_context(resolve_path(source) if is_local else source):
        model.check()
    with translate_write_errors(out):
        model.write(out)
    return model


def resolve_path(source: str) -> Path:
    """Return the path; one without a name, such as ".", is made absolute, so that provenance can record a name."""
    return Path(os.path.realpath(source)) if Path(source).name in ("", "..") else Path(source)


def import_model(source: str, tokenizer: Path | None = None) -> ModelBundle:
    """Read a Hugging Face folder, a GGUF file, a llama2.c checkpoint or a .pt state dict.

    `tokenizer`: a tokenizer.json, a folder that contains one, or llama2.c's tokenizer.bin; it replaces the source's
    own. `UserError` if the source is none of these, is damaged, or needs what our architectures do not have.
    """
    path = resolve_path(source)
    with os_errors("--tokenizer"):
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        if tokenizer is not None and not tokenizer.is_file():
            raise UserError(
                f"--tokenizer {tokenizer}: no such file; expected a tokenizer.json, or llama2.c's tokenizer.bin"
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
        f"{path}: unknown format; expected a Hugging Face folder, a .gguf, a llama2.c .bin, or a .pt state dict"
    )


def read_folder(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read one of our model directories, a folder whose only weights are one GGUF file, or a Hugging Face folder."""
    if is_native_model(path):
        if tokenizer is not None:
            raise UserError(f"{path} is a model directory, which has its own tokenizer; leave --tokenizer out")
        return ModelBundle.read(path)
    weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file()]
    if len(weights) == 1 and weights[0].suffix == ".gguf":
        return gguf.read(weights[0], tokenizer)
    if not is_model(path):
        raise UserError(f"{path} contains no model: neither a config.json nor a single GGUF file")
    return hf_folder.read(path, tokenizer)
