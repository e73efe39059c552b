"""Export to the formats of other programs. Each export is read back and compared with the model before it is kept."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.source.resolve import SAMPLE_PATH
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.files import atomic_replace, require_name, temp_sibling
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.destination import check_destination, translate_write_errors
from tinystories.formats.gguf import format as gguf
from tinystories.formats.hf import format as hf_folder
from tinystories.formats.llama2c import format as llama2c
from tinystories.formats.onnx import format as onnx_format

Logits = npt.NDArray[Any]
MAX_IDS = 64  # length of the text on which an export is compared with the model


@dataclasses.dataclass(frozen=True)
class Format:
    """An export format: how it is written, and how it is read back for verification.

    `max_divergence`: for each precision (the first is the default) the largest accepted mean KL divergence, in nats, of
    the file's predictions from the model's; 0 means that logits must agree to FP32_TOLERANCE instead.
    `write(model, path, precision)` writes the file, and none, some or all of `sidecars(path)` beside it. If it
    renumbers ids, it returns the permutation: file id = permutation[our id].
    `logits(path, ids)` reads the file the way its users will and returns (T, V) logits.
    `next_steps(path)`: a message that tells the user how to run the file.
    """

    max_divergence: dict[str, float]
    write: Callable[[ModelBundle, Path, str], Logits | None]
    logits: Callable[[Path, list[int]], Logits]
    sidecars: Callable[[Path], list[Path]] = lambda _: []
    next_steps: Callable[[Path], str] = lambda _: ""
    is_folder: bool = False


# Largest accepted difference of fp32 logits, for logits up to 10 (see `compare_logits`).
FP32_TOLERANCE = 1e-4

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
    """The files written, and how far their logits are from the model's over the first `n_ids` ids of a story."""

    paths: list[Path]
    max_difference: float
    kl_divergence: float
    n_ids: int


def export(model: ModelBundle, name: str, out: Path, *, precision: str = "", force: bool = False) -> ExportResult:
    """Write the model to `out` in format `name` (a key of FORMATS), all files or none.

    `precision` "": the format's default. With `force`, an earlier export is replaced together with its sidecars, also
    those that the new export does not have. `UserError` if the format cannot represent the model, if `out` must not be
    replaced (see `check_destination`), or if the logits of the written file differ too much from the model's.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name} is unknown; use one of {', '.join(FORMATS)}")
    export_format = FORMATS[name]
    precision = precision.lower() or next(iter(export_format.max_divergence))
    if precision not in export_format.max_divergence:
        raise UserError(
            f"--format {name} has no --precision {precision}; use {', '.join(export_format.max_divergence)}"
        )
    require_name(out)
    sidecars = export_format.sidecars(out)
    if out.name.lower() in (path.name.lower() for path in sidecars):
        raise UserError(f"{out} is also the name of a file that the export writes beside --out; choose another --out")
    with translate_write_errors(out):
        for path in (out, *sidecars):
            check_destination(path, is_folder=export_format.is_folder, force=force, source=model.folder)
        with temp_sibling(out) as staging_dir:
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
                atomic_replace(staging_dir / path.name, path)
        for path in sidecars:
            if path not in paths:
                path.unlink(missing_ok=True)
    return ExportResult(paths, max_difference, kl_divergence, len(ids))


def encode_sample_story(model: ModelBundle) -> list[int]:
    """Encode END and the beginning of the first bundled story, at most MAX_IDS ids."""
    story = SAMPLE_PATH.read_text(encoding="utf-8").split(END, 1)[0].strip()
    ids = [model.tokenizer.end_id, *model.tokenizer.encode(story)]
    return ids[: min(MAX_IDS, model.config.n_ctx)]


def compare_logits(model_logits: Logits, file_logits: Logits) -> tuple[float, float]:
    """Compare (T, V) logits: return the largest difference and the mean KL divergence in nats.

    If logits exceed 10 in magnitude, the difference is divided by a tenth of the largest one.
    """
    if model_logits.shape != file_logits.shape:
        raise UserError(
            f"verification failed: logits of the exported file are of shape {file_logits.shape}, not"
            f" {model_logits.shape}"
        )
    with np.errstate(invalid="ignore"):  # `check_agreement` rejects NaN
        max_difference = float(np.abs(model_logits - file_logits).max() / max(1, np.abs(model_logits).max() / 10))
        p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None] for x in (model_logits, file_logits))
        return max_difference, float((np.exp(p) * (p - q)).sum(axis=1).mean())


def check_agreement(export_format: Format, precision: str, max_difference: float, kl_divergence: float) -> None:
    """Raise `UserError` if the differences exceed what the format allows for `precision`, or are NaN."""
    max_divergence = export_format.max_divergence[precision]
    # `not (a <= b)` rather than `a > b`: it also catches NaN.
    if not (kl_divergence <= max_divergence if max_divergence else max_difference <= FP32_TOLERANCE):
        raise UserError(
            "verification failed: logits of the exported file differ from the model's by up to"
            f" {max_difference:.2g} (KL divergence {kl_divergence:.2g} nats); nothing was written"
        )
