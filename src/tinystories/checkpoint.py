"""A model is a directory, written whole or not at all. Reading needs no torch; nothing here is ever pickled.

`config.json` holds the architecture, the provenance and the SHA-256 of every other file; it is checked on reading.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tinystories.config import PRESETS, ModelConfig, SamplingConfig, build
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError, bounded, reading, shown

if TYPE_CHECKING:
    import torch

    from tinystories.model import GPT

FORMAT = 1
WEIGHTS = "model.safetensors"
PACKED = "packed-int8.safetensors"  # in its place, in a model that is shipped small (engine/cpu/shipped.py)
DRAFT = ".draft"
MOST_JSON = 64_000_000  # bytes of a description; real ones have thousands
BUNDLED = Path(__file__).parent / "bundled"  # the storyteller that comes with the package


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model directory that has been read and verified; weights and tokeniser are loaded when asked for."""

    folder: Path
    config: ModelConfig
    provenance: dict[str, Any]
    sampling: SamplingConfig
    sums: dict[str, str]  # SHA-256 of the other files

    @property
    def is_packed(self) -> bool:
        return WEIGHTS not in self.sums

    @property
    def weights_path(self) -> Path:
        return self.folder / (PACKED if self.is_packed else WEIGHTS)

    @property
    def weights_sha256(self) -> str:
        return self.sums[self.weights_path.name]

    def check_weights(self) -> None:
        """`UserError` where the weights are not those that config.json names."""
        verify(self.folder, {self.weights_path.name: self.weights_sha256})

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer


def is_model(folder: Path) -> bool:
    with reading(folder):
        return (folder / "config.json").is_file()


def is_ours(folder: Path) -> bool:
    """Whether a folder is a model directory, rather than one of Hugging Face transformers (whole or not)."""
    return is_model(folder) and "format" in read_json(folder / "config.json")


def read_model(folder: Path | str, *, check_weights: bool = True) -> ModelFiles:
    """Verify and describe a model directory. `UserError` where a file is missing, altered or of another format.

    Without `check_weights` the weights' checksum is left to the caller (`ModelFiles.check_weights`): it takes longest.
    """
    folder = Path(folder)
    with reading(shown(str(folder))):
        if not folder.is_dir():
            raise UserError(f"{folder}: {why_no_model(folder)}")
    if not is_model(folder):
        raise UserError(f"{folder} holds no model (no config.json); expected what `tinystories train` writes")
    described = read_json(folder / "config.json")
    if "format" not in described and "model_type" in described:
        raise UserError(f"{folder} is a Hugging Face folder; make a model directory of it by: {importing(folder)}")
    if described.get("format") != FORMAT:
        raise UserError(
            f"{folder}/config.json: format {shown(described.get('format'))} is not {FORMAT};"
            " not written by this program"
        )
    verify(folder, described.get("files"), set() if check_weights else {WEIGHTS, PACKED})
    settings = described.get("model")
    if not isinstance(settings, dict):
        raise UserError(f"{folder}/config.json: [model] is missing")
    return ModelFiles(
        folder=folder,
        config=build(ModelConfig, settings, f"{folder}/config.json", "model."),
        provenance=dict(described.get("provenance") or {}),
        sampling=build(SamplingConfig, read_json(folder / "generation.json"), f"{folder}/generation.json"),
        sums=described["files"],
    )


def why_no_model(path: Path) -> str:
    """Of a path that is no directory: what it may have been meant for."""
    if path.suffix in (".gguf", ".bin", ".pt", ".pth", ".safetensors") and path.is_file():
        return f"a file of another program; make a model directory of it by: {importing(path)}"
    if path.is_file():
        return "a file; a model is a directory, as `tinystories train` writes it"
    if " " in str(path):
        return "no such model directory; to begin a story with these words: --prompt"
    preset = f"--config {path.name} " if path.name in PRESETS else ""
    return f"no such model directory; train one with: tinystories train {preset}--out {shlex.quote(str(path))}"


def importing(path: Path) -> str:
    return f"tinystories import {shlex.quote(str(path))} --out DIR"


def verify(folder: Path, sums: object, unchecked: Collection[str] = ()) -> None:
    """Compare the files that config.json names with their SHA-256; of those in `unchecked` only that they are there."""
    if not isinstance(sums, dict) or not {WEIGHTS, PACKED} & sums.keys():
        raise UserError(f"{folder}/config.json names no checksums; the model is incomplete")
    for name, expected in sums.items():
        path = folder / str(name)
        if Path(str(name)).name != name:
            raise UserError(f"{folder}/config.json: file name {shown(name)} leads out of the model directory")
        with reading(f"{folder}: file {shown(name)}"):
            there = path.is_file()
        if not there:
            raise UserError(f"{folder}: file {shown(name)} is missing; the model is incomplete")
        if name not in unchecked and sha256(path) != expected:
            raise UserError(f"{path} does not match its checksum in config.json: it was altered or is damaged")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(bounded(path, MOST_JSON).decode())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the model is incomplete") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(files: ModelFiles, model: "GPT") -> None:
    """Copy a directory's weights into a model of the same config. `UserError` where names or shapes differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(files.weights_path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{files.weights_path} cannot be read: {error}") from None
    put_weights(weights, model, files.weights_path)


def put_weights(weights: "Mapping[str, torch.Tensor]", model: "GPT", where: Path) -> None:
    """Copy weights into a model. `UserError`, which names `where`, unless names and shapes are the model's."""
    wanted = saved_weights(model)
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            raise UserError(f"{where}: weight {shown(name)} is {'unknown' if name in weights else 'missing'}")
        if weights[name].shape != wanted[name].shape:
            raise UserError(f"{where}: {name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}")
    model.load_state_dict(weights, strict=False)


def saved_weights(model: "GPT") -> "dict[str, torch.Tensor]":
    """The weights that go to disk: a tied head is stored once, as the embedding."""
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
    """Write the files of a model into an existing folder (a draft: see `whole`)."""
    weights = {name: weight.numpy(force=True) for name, weight in saved_weights(model).items()}
    write_arrays(folder, model.config, weights, tokenizer, sampling, provenance)


def write_arrays(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, npt.NDArray[Any]],
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    provenance: Mapping[str, Any],
) -> None:
    """As `write_model`, without torch. Weights: contiguous, fp32, by the names that `saved_weights` gives."""
    save_weights(folder / WEIGHTS, weights)
    tokenizer.save(folder / "tokenizer.json")
    describe(folder, config, sampling, provenance, WEIGHTS)


def save_weights(path: Path, weights: Mapping[str, npt.NDArray[Any]]) -> None:
    """A safetensors file, which others may read as any new file: the library leaves it to its owner alone."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(weights), path, metadata={"format": "pt"})
    path.chmod(mode)


def describe(
    folder: Path, config: ModelConfig, sampling: SamplingConfig, provenance: Mapping[str, Any], weights: str
) -> None:
    """Write generation.json and config.json beside a tokenizer and weights of that name."""
    write_json(folder / "generation.json", dataclasses.asdict(sampling))
    names = (weights, "tokenizer.json", "generation.json")
    described = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "provenance": dict(provenance),
        "files": {name: sha256(folder / name) for name in names},
    }
    write_json(folder / "config.json", described)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole(final: Path, draft: Path | None = None) -> Iterator[Path]:
    """`with whole(final) as draft:` fills `draft`; it becomes `final` by one rename, or leaves nothing.

    Everything is on the disk before the rename. A `final` that exists is replaced. The draft lies in a hidden folder
    beside `final`, or is the folder `draft`, a name that is kept free for it: what a kill left there is removed.
    """
    require_name(final)
    with contextlib.ExitStack() as stack:
        if draft is None:
            draft = stack.enter_context(beside(final)) / final.name
        else:
            shutil.rmtree(draft, ignore_errors=True)
            stack.callback(shutil.rmtree, draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        put(draft, final)
        sync(final.parent)


def require_name(path: Path) -> None:
    if path.name in ("", ".."):
        raise UserError(f"{path} is no name for something new; name a path such as {path / 'stories'}")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new hidden folder in the same directory, for drafts; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=DRAFT, dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(draft: Path, final: Path) -> None:
    """Rename. A directory that was there is removed once the new one stands, and is back if it does not."""
    if not final.is_dir():
        os.replace(draft, final)
        return
    with beside(final) as aside:
        os.replace(final, aside / final.name)
        try:
            os.replace(draft, final)
        except OSError:
            os.replace(aside / final.name, final)
            raise


def sync(path: Path) -> None:
    """Force a file or directory to the disk (directories cannot be synced on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(checkpoint: Path, run: Path) -> None:
    """Make the run directory itself a model directory: that of a finished checkpoint.

    Each file is replaced by one rename, config.json last. Hard links where the file system has them.
    """
    names = [path.name for path in checkpoint.iterdir() if path.is_file() and path.name != "config.json"]
    for name in (*sorted(names), "config.json"):
        draft = run / (name + DRAFT)
        draft.unlink(missing_ok=True)
        try:
            os.link(checkpoint / name, draft)
        except OSError:
            shutil.copyfile(checkpoint / name, draft)
            sync(draft)
        os.replace(draft, run / name)
        draft.unlink(missing_ok=True)  # renaming a link over its own file leaves both names
    sync(run)


def folder_of(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 for a folder that is no checkpoint's."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of a run's whole checkpoints, oldest first. Drafts are not checkpoints."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((step_of(folder), folder) for folder in folders if step_of(folder) >= 0 and is_model(folder))
