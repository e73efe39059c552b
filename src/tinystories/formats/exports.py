"""Export to the formats of other programs. Each export is read back and compared with the model before it is kept."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.source.resolve import SAMPLE_PATH
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.files import atomic_replace, require_name, temp_sibling, write_errors
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.destination import check_destination
from tinystories.formats.protocol import FP32_TOLERANCE, Format, max_logit_difference
from tinystories.formats.registry import EXPORT_NAMES, FORMATS

Logits = npt.NDArray[Any]
MAX_IDS = 64  # length of the text on which an export is compared with the model


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """The files written, and how far their logits are from the model's over the first `n_ids` ids of a story.

    `report` says in words what was verified. Files that are programs are run instead (`Format.check`); `is_verified` is
    false if nothing on this machine can run them.
    """

    paths: list[Path]
    report: str
    is_verified: bool = True
    max_difference: float = 0.0
    kl_divergence: float = 0.0
    n_ids: int = 0


def export(
    model: ModelBundle,
    name: str,
    out: Path,
    *,
    precision: str = "",
    force: bool = False,
    require_check: bool = False,
) -> ExportResult:
    """Write the model to `out` in format `name` (one of EXPORT_NAMES), all files or none.

    `precision` "": the format's default. With `force`, an earlier export is replaced together with its sidecars, also
    those that the new export does not have. `UserError` if the format cannot represent the model, if `out` must not be
    replaced (see `check_destination`), if the logits of the written file differ too much from the model's, or, with
    `require_check`, if nothing on this machine can run a file that is a program.
    """
    if name not in EXPORT_NAMES:
        raise UserError(f"--format {name} is unknown; use one of {', '.join(EXPORT_NAMES)}")
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
    with write_errors(out):
        for path in (out, *sidecars):
            check_destination(path, is_folder=export_format.is_folder, force=force, source=model.folder)
        with temp_sibling(out) as staging_dir:
            result = write_and_verify(model, export_format, staging_dir / out.name, precision)
            if require_check and not result.is_verified:
                raise UserError(f"{result.report}; --require-check keeps no export that was not run")
            paths = [out.parent / path.name for path in result.paths]
            assert set(paths) <= {out, *sidecars}
            new_paths = [path for path in paths if not os.path.lexists(path)]
            try:
                for path in paths:
                    atomic_replace(staging_dir / path.name, path)
            except BaseException:  # all files or none, so that the next export is not refused because of this one
                for path in new_paths:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                raise
        for path in sidecars:
            if path not in paths:
                path.unlink(missing_ok=True)
    return dataclasses.replace(result, paths=paths)


def write_and_verify(model: ModelBundle, export_format: Format, path: Path, precision: str) -> ExportResult:
    """Write the model to `path`, in an empty folder; `UserError` if its logits or ids differ from the model's."""
    assert export_format.write is not None
    id_permutation = export_format.write(model, path, precision)
    if export_format.check is not None:
        report = export_format.check(model, path)
        paths = sorted(path.parent.iterdir())
        if report is None:
            return ExportResult(paths, "not run here: install Node.js or Chromium to verify it", is_verified=False)
        return ExportResult(paths, f"verified: {report}")
    assert export_format.logits is not None
    ids = encode_sample_story(model)
    if id_permutation is None:
        file_logits = export_format.logits(path, ids)
    else:
        file_logits = export_format.logits(path, id_permutation[ids].tolist())[:, id_permutation]
    max_difference, kl_divergence = compare_logits(model.logits(ids), file_logits)
    check_agreement(export_format.max_divergence[precision], max_difference, kl_divergence)
    return ExportResult(
        sorted(path.parent.iterdir()),
        f"verified: over {len(ids)} tokens of a story, logits differ by at most {max_difference:.2g}"
        f" (KL divergence {kl_divergence:.2g} nats)",
        max_difference=max_difference,
        kl_divergence=kl_divergence,
        n_ids=len(ids),
    )


def encode_sample_story(model: ModelBundle) -> list[int]:
    """Encode END and the beginning of the first bundled story, at most MAX_IDS ids."""
    story = SAMPLE_PATH.read_text(encoding="utf-8").split(END, 1)[0].strip()
    ids = [model.tokenizer.end_id, *model.tokenizer.encode(story)]
    return ids[: min(MAX_IDS, model.config.n_ctx)]


def compare_logits(model_logits: Logits, file_logits: Logits) -> tuple[float, float]:
    """Compare (T, V) logits: return `max_logit_difference` and the mean KL divergence in nats."""
    if model_logits.shape != file_logits.shape:
        raise UserError(
            f"verification failed: logits of the exported file are of shape {file_logits.shape}, not"
            f" {model_logits.shape}"
        )
    with np.errstate(invalid="ignore"):  # `check_agreement` rejects NaN
        max_difference = max_logit_difference(file_logits, model_logits)
        p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None] for x in (model_logits, file_logits))
        return max_difference, float((np.exp(p) * (p - q)).sum(axis=1).mean())


def check_agreement(max_divergence: float, max_difference: float, kl_divergence: float) -> None:
    """Raise `UserError` if the differences exceed `Format.max_divergence`, or are NaN."""
    # `not (a <= b)` rather than `a > b`: it also catches NaN.
    if not (kl_divergence <= max_divergence if max_divergence else max_difference <= FP32_TOLERANCE):
        raise UserError(
            "verification failed: logits of the exported file differ from the model's by up to"
            f" {max_difference:.2g} (KL divergence {kl_divergence:.2g} nats); nothing was written"
        )
