"""Our models in the files of other programs. Each export is read back and compared before it is kept."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.data.sources import SAMPLE_PATH
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.interop import gguf, hf_folder, llama2c, onnx_format
from tinystories.interop.destination import check_destination, translate_write_errors
from tinystories.interop.model_bundle import ModelBundle

Logits = npt.NDArray[Any]
MAX_IDS = 64  # of the text that an export is compared on


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kind of file is written, and what other code makes of it.

    `write(model, path, precision)` puts none, some or all of `companions(path)` beside the path; it returns the file's
    id of each of ours where they differ. `logits(path, ids)` reads the file as its users will and returns (T, V).
    `divergence`: of each precision, the first being the default, the largest mean Kullback-Leibler divergence (nats) of
    what it predicts from what the model does; fp32 is held to LARGEST instead.
    `hint(path)`: what to do with the file next.
    """

    max_divergence: dict[str, float]
    write: Callable[[ModelBundle, Path, str], Logits | None]
    logits: Callable[[Path, list[int]], Logits]
    sidecars: Callable[[Path], list[Path]] = lambda _: []
    next_steps: Callable[[Path], str] = lambda _: ""
    is_folder: bool = False


FP32_TOLERANCE = 1e-4  # difference of logits in fp32, for logits up to 10

FORMATS = {
    "hf": Format({"f32": 0}, hf_folder.write, hf_folder.logits, next_steps=hf_folder.next_steps, is_folder=True),
    "gguf": Format(
        {"f32": 0, "f16": 1e-4, "q8_0": 0.01, "q4_0": 0.5}, gguf.write, gguf.logits, gguf.sidecars, gguf.next_steps
    ),
    "llama2c": Format({"f32": 0, "q8_0": 0.01}, llama2c.write, llama2c.logits, llama2c.sidecars, llama2c.next_steps),
    "onnx": Format({"f32": 0}, onnx_format.write, onnx_format.logits, onnx_format.sidecars, onnx_format.next_steps),
}


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What came of it: the files, and how far their logits are from the model's on `n_ids` ids of a story."""

    paths: list[Path]
    max_difference: float
    kl_divergence: float
    n_ids: int


def export(model: ModelBundle, name: str, out: Path, *, precision: str = "", force: bool = False) -> ExportResult:
    """Write the model in the format of that name to `out`; nothing is left there unless it reads back the same.

    `UserError` where the format cannot hold the model, where something is in the way (see `require_place`), and where
    the logits differ too much. With `force` companions of an earlier export go, also those that are not written anew.
    """
    if name not in FORMATS:
        raise UserError(f"format {name} is not known; use one of {', '.join(FORMATS)}")
    export_format = FORMATS[name]
    precision = precision.lower() or next(iter(export_format.max_divergence))
    if precision not in export_format.max_divergence:
        raise UserError(f"format {name} has no precision {precision}; use {', '.join(export_format.max_divergence)}")
    checkpoint.require_name(out)
    sidecars = export_format.sidecars(out)
    if out.name.lower() in (path.name.lower() for path in sidecars):
        raise UserError(f"{out} is the name of a file that goes beside it; choose another --out")
    with translate_write_errors(out):
        for path in (out, *sidecars):
            check_destination(path, is_folder=export_format.is_folder, force=force, source=model.folder)
        with checkpoint.temp_sibling(out) as staging_dir:
            id_permutation = export_format.write(model, staging_dir / out.name, precision)
            ids = encode_sample_story(model)
            if id_permutation is None:
                file_logits = export_format.logits(staging_dir / out.name, ids)
            else:
                file_logits = export_format.logits(staging_dir / out.name, id_permutation[ids].tolist())[
                    :, id_permutation
                ]
            max_difference, kl_divergence = compare_logits(model.logits(ids), file_logits)
            check_agreement(export_format, precision, max_difference, kl_divergence)
            paths = [out.parent / path.name for path in sorted(staging_dir.iterdir())]
            assert set(paths) <= {out, *sidecars}
            for path in paths:
                checkpoint.atomic_replace(staging_dir / path.name, path)
        for path in sidecars:
            if path not in paths:
                path.unlink(missing_ok=True)
    return ExportResult(paths, max_difference, kl_divergence, len(ids))


def encode_sample_story(model: ModelBundle) -> list[int]:
    """The beginning of a story, END in front."""
    story = SAMPLE_PATH.read_text(encoding="utf-8").split(END, 1)[0].strip()
    ids = [model.tokenizer.end_id, *model.tokenizer.encode(story)]
    return ids[: min(MAX_IDS, model.config.n_ctx)]


def compare_logits(model_logits: Logits, file_logits: Logits) -> tuple[float, float]:
    """Largest difference of logits (for logits up to 10; else relative), and mean KL divergence in nats."""
    if model_logits.shape != file_logits.shape:
        raise UserError(f"the file gives logits of shape {file_logits.shape}, not {model_logits.shape}")
    with np.errstate(invalid="ignore"):  # what is not a number is found out by the caller
        max_difference = float(np.abs(model_logits - file_logits).max() / max(1, np.abs(model_logits).max() / 10))
        p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None] for x in (model_logits, file_logits))
        return max_difference, float((np.exp(p) * (p - q)).sum(axis=1).mean())


def check_agreement(export_format: Format, precision: str, max_difference: float, kl_divergence: float) -> None:
    max_divergence = export_format.max_divergence[precision]
    if not (
        kl_divergence <= max_divergence if max_divergence else max_difference <= FP32_TOLERANCE
    ):  # also where they are not numbers
        raise UserError(
            f"the file does not say what the model says (logits differ by up to {max_difference:.2g}, divergence"
            f" {kl_divergence:.2g}); nothing was written"
        )
