"""Import models of other programs as model directories. Every file is treated as hostile until it has been checked."""

import os
from collections.abc import Callable
from pathlib import Path

from tinystories.checkpoint import is_native_model
from tinystories.errors import UserError
from tinystories.files import os_errors, write_errors
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.destination import check_destination
from tinystories.formats.registry import FORMATS
from tinystories.formats.split_files import explain_weights_file


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
    is_remote = source.startswith("hf:") and download is not None
    with write_errors(out):
        check_destination(out, is_folder=True, force=force, source=None if is_remote else Path(source))
    model = import_model(str(download(source)) if is_remote and download else source, tokenizer)
    with write_errors(out):
        model.write(out)
    return model


def import_model(source: str, tokenizer: Path | None = None) -> ModelBundle:
    """Read and check a model of any format, or one of our model directories.

    `tokenizer`: a tokenizer.json, a folder that contains one, llama2.c's tokenizer.bin, or `gpt2`; it replaces the
    source's own. `UserError` if the source is of no known format, is damaged, or needs what our architectures do not
    have.
    """
    # A path without a name, such as ".", is made absolute, so that provenance can record a name.
    path = Path(os.path.realpath(source)) if Path(source).name in ("", "..") else Path(source)
    with os_errors("--tokenizer"):
        if tokenizer is not None and str(tokenizer) != "gpt2" and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        if tokenizer is not None and str(tokenizer) != "gpt2" and not tokenizer.is_file():
            raise UserError(
                f"--tokenizer {tokenizer}: no such file; expected a tokenizer.json, llama2.c's tokenizer.bin, or gpt2"
            )
    with os_errors(path):
        path.stat()
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is neither a file nor a directory")
        if path.is_dir() and is_native_model(path):
            if tokenizer is not None:
                raise UserError(f"{path} is a model directory, which has its own tokenizer; leave --tokenizer out")
            return ModelBundle.read(path)
        if explanation := explain_weights_file(path):
            raise UserError(explanation)
        read = next((item.read for item in FORMATS.values() if item.read is not None and item.can_read(path)), None)
    if read is None and path.is_dir():
        raise UserError(f"{path} contains no model: neither a config.json nor a single GGUF file")
    if read is None:
        raise UserError(
            f"{path}: unknown format; expected a Hugging Face folder, a .gguf, a llama2.c .bin, or a .pt state dict"
        )
    with os_errors(path):
        model = read(path, tokenizer)
        model.check(path)
    return model
