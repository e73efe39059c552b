"""Model directories and checkpoints: read, verify, write. Reading needs no torch; nothing is pickled.

`config.json` holds the architecture, the provenance and the SHA-256 of every other file, which reading verifies.
"""

import dataclasses
import functools
import os
import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.config_file import PRESETS, build_dataclass
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError, quoted
from tinystories.files import TEMP_SUFFIX, fsync, os_errors, read_json_object, sha256, write_json

if TYPE_CHECKING:
    import torch

    from tinystories.model import GPT

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
# Replaces WEIGHTS in an int8-only model directory (`weights.load.write_int8_model`).
INT8_WEIGHTS = "packed-int8.safetensors"
BUNDLED_MODEL = Path(__file__).parent / "bundled"  # the model shipped with the package


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model directory that has been read and verified; the weights and the tokenizer are loaded on demand."""

    folder: Path
    config: ModelConfig
    provenance: dict[str, Any]
    sampling: SamplingConfig
    checksums: dict[str, str]  # SHA-256 of the other files

    @property
    def is_int8_only(self) -> bool:
        """Whether the directory has int8 weights instead of fp32 ones."""
        return WEIGHTS not in self.checksums

    @property
    def weights_path(self) -> Path:
        return self.folder / (INT8_WEIGHTS if self.is_int8_only else WEIGHTS)

    @property
    def weights_sha256(self) -> str:
        return self.checksums[self.weights_path.name]

    def verify_weights(self) -> None:
        """Verify the checksum of the weights. `UserError` if it differs from the one in config.json."""
        verify_checksums(self.folder, {self.weights_path.name: self.weights_sha256})

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer on the first call, and return it."""
        return self._tokenizer


def is_model(folder: Path) -> bool:
    """Whether a folder has a config.json, ours or that of Hugging Face transformers."""
    with os_errors(folder):
        return (folder / "config.json").is_file()


def is_native_model(folder: Path) -> bool:
    """Whether a folder is one of our model directories (possibly incomplete), and not a Hugging Face one."""
    return is_model(folder) and "format" in read_json(folder / "config.json")


def read_model(folder: Path | str, *, verify_weights: bool = True) -> ModelFiles:
    """Read and verify a model directory. `UserError` if a file is missing or altered, or the format is unknown.

    With `verify_weights=False` the caller verifies the weights' checksum, the slowest part, by
    `ModelFiles.verify_weights`.
    """
    folder = Path(folder)
    with os_errors(quoted(str(folder))):
        if not folder.is_dir():
            raise UserError(f"{folder}: {explain_missing_model(folder)}")
    if not is_model(folder):
        raise UserError(
            f"{folder} is not a model directory (no config.json); expected a directory written by `tinystories train`"
        )
    config_json = read_json(folder / "config.json")
    if "format" not in config_json and "model_type" in config_json:
        raise UserError(
            f"{folder} is a Hugging Face model; convert it to a model directory with: {import_command(folder)}"
        )
    if config_json.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{folder}/config.json: unsupported format {quoted(config_json.get('format'))}, expected"
            f" {FORMAT_VERSION}; the file was not written by this program"
        )
    verify_checksums(folder, config_json.get("files"), set() if verify_weights else {WEIGHTS, INT8_WEIGHTS})
    settings = config_json.get("model")
    if not isinstance(settings, dict):
        raise UserError(f"{folder}/config.json: [model] is missing")
    provenance = config_json.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise UserError(f"{folder}/config.json: [provenance] must be an object")
    return ModelFiles(
        folder=folder,
        config=build_dataclass(ModelConfig, settings, f"{folder}/config.json", "model."),
        provenance=provenance,
        sampling=build_dataclass(SamplingConfig, read_json(folder / "generation.json"), f"{folder}/generation.json"),
        checksums=config_json["files"],
    )


def explain_missing_model(path: Path) -> str:
    """Return why a path is not a model directory, and what the user probably meant."""
    if path.suffix in (".gguf", ".bin", ".pt", ".pth", ".safetensors") and path.is_file():
        return f"a model file of another program; convert it to a model directory with: {import_command(path)}"
    if path.is_file():
        return "is a file; a model is a directory written by `tinystories train`"
    if " " in str(path):
        return "no such model directory; to start a story with this text, use --prompt"
    preset = f"--config {path.name} " if path.name in PRESETS else ""
    return f"no such model directory; train one with: tinystories train {preset}--out {shlex.quote(str(path))}"


def import_command(path: Path) -> str:
    """Return the shell command that imports a model of another program."""
    return f"tinystories import {shlex.quote(str(path))} --out DIR"


def verify_checksums(folder: Path, checksums: object, unchecked: Collection[str] = ()) -> None:
    """Verify the SHA-256 of each file that config.json lists; files in `unchecked` only have to exist."""
    if not isinstance(checksums, dict) or not {WEIGHTS, INT8_WEIGHTS} & checksums.keys():
        raise UserError(f"{folder}/config.json lists no checksums; the model is incomplete")
    for name, expected in checksums.items():
        path = folder / str(name)
        if Path(str(name)).name != name:
            raise UserError(f"{folder}/config.json: file name {quoted(name)} points outside the model directory")
        with os_errors(f"{folder}: file {quoted(name)}"):
            exists = path.is_file()
        if not exists:
            raise UserError(f"{folder}: file {quoted(name)} is missing; the model is incomplete")
        if name not in unchecked and sha256(path) != expected:
            raise UserError(f"{path} does not match its checksum in config.json: the file was altered or is damaged")


def read_json(path: Path) -> dict[str, Any]:
    """Read an untrusted file that holds a JSON object. `UserError` if it is missing, too large or malformed."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the model is incomplete") from None


def state_dict_to_save(model: "GPT") -> "dict[str, torch.Tensor]":
    """Return the weights to write to disk; a tied head is stored once, as the embedding."""
    weights = model.state_dict()
    if model.config.tied:
        del weights["lm_head.weight"]
    return {name: weight.contiguous() for name, weight in weights.items()}


def write_model(
    folder: Path,
    model: "GPT",
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    provenance: Mapping[str, Any],
) -> None:
    """Write the files of a model into an existing folder, usually the staging folder of `atomic_directory`."""
    weights = {name: weight.numpy(force=True) for name, weight in state_dict_to_save(model).items()}
    write_arrays(folder, model.config, weights, tokenizer, sampling, provenance)


def write_arrays(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, npt.NDArray[Any]],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    provenance: Mapping[str, Any],
) -> None:
    """Write the files of a model from NumPy weights: contiguous, fp32, named as by `state_dict_to_save`."""
    save_weights(folder / WEIGHTS, weights)
    tokenizer.save(folder / "tokenizer.json")
    write_config(folder, config, sampling, provenance, WEIGHTS)


def save_weights(path: Path, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a safetensors file with the permissions of any new file; the library alone would make it private."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(weights), path, metadata={"format": "pt"})
    path.chmod(mode)


def write_config(
    folder: Path, config: ModelConfig, sampling: SamplingConfig, provenance: Mapping[str, Any], weights_name: str
) -> None:
    """Write generation.json and config.json into a folder that already holds the tokenizer and the weights."""
    write_json(folder / "generation.json", dataclasses.asdict(sampling))
    names = (weights_name, "tokenizer.json", "generation.json")
    config_json = {
        "format": FORMAT_VERSION,
        "model": dataclasses.asdict(config),
        "provenance": dict(provenance),
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(folder / "config.json", config_json)


def publish(checkpoint: Path, run: Path) -> None:
    """Make the run directory itself a model directory, with the files of a finished checkpoint.

    Each file is replaced by one rename, config.json last. Files are hard links if the file system supports them.
    """
    names = [path.name for path in checkpoint.iterdir() if path.is_file() and path.name != "config.json"]
    for name in (*sorted(names), "config.json"):
        temp_file = run / (name + TEMP_SUFFIX)
        temp_file.unlink(missing_ok=True)
        try:
            os.link(checkpoint / name, temp_file)
        except OSError:
            shutil.copyfile(checkpoint / name, temp_file)
            fsync(temp_file)
        os.replace(temp_file, run / name)
        temp_file.unlink(missing_ok=True)  # renaming a hard link onto the same file keeps both names
    fsync(run)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the path of a run's checkpoint at a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step of a checkpoint folder, or -1 if the folder is not a checkpoint."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def list_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of a run's complete checkpoints, oldest first; staging folders are left out."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(
        (checkpoint_step(folder), folder) for folder in folders if checkpoint_step(folder) >= 0 and is_model(folder)
    )
