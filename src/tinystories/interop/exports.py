"""Our models in the files of other programs. Each export is read back and compared before it is kept."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.data.sources import SAMPLE
from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.interop import gguf, hf_folder, llama2c, onnx_graph
from tinystories.interop.place import require_place, writing
from tinystories.interop.portable import Portable

Logits = npt.NDArray[Any]
MOST_IDS = 64  # of the text that an export is compared on


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kind of file is written, and what other code makes of it.

    `write(model, path, precision)` puts none, some or all of `companions(path)` beside the path; it returns the file's
    id of each of ours where they differ. `logits(path, ids)` reads the file as its users will and returns (T, V).
    `divergence`: of each precision, the first being the default, the largest mean Kullback-Leibler divergence (nats) of
    what it predicts from what the model does; fp32 is held to LARGEST instead.
    `hint(path)`: what to do with the file next.
    """

    divergence: dict[str, float]
    write: Callable[[Portable, Path, str], Logits | None]
    logits: Callable[[Path, list[int]], Logits]
    companions: Callable[[Path], list[Path]] = lambda _: []
    hint: Callable[[Path], str] = lambda _: ""
    is_folder: bool = False


LARGEST = 1e-4  # difference of logits in fp32, for logits up to 10

FORMATS = {
    "hf": Format({"f32": 0}, hf_folder.write, hf_folder.logits, hint=hf_folder.hint, is_folder=True),
    "gguf": Format(
        {"f32": 0, "f16": 1e-4, "q8_0": 0.01, "q4_0": 0.5}, gguf.write, gguf.logits, gguf.companions, gguf.hint
    ),
    "llama2c": Format({"f32": 0, "q8_0": 0.01}, llama2c.write, llama2c.logits, llama2c.companions, llama2c.hint),
    "onnx": Format({"f32": 0}, onnx_graph.write, onnx_graph.logits, onnx_graph.companions, onnx_graph.hint),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What came of it: the files, and how far their logits are from the model's on `n_ids` ids of a story."""

    paths: list[Path]
    largest: float
    divergence: float
    n_ids: int


def export(model: Portable, name: str, out: Path, *, precision: str = "", force: bool = False) -> Exported:
    """Write the model in the format of that name to `out`; nothing is left there unless it reads back the same.

    `UserError` where the format cannot hold the model, where something is in the way (see `require_place`), and where
    the logits differ too much. With `force` companions of an earlier export go, also those that are not written anew.
    """
    if name not in FORMATS:
        raise UserError(f"format {name} is not known; use one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    precision = precision.lower() or next(iter(form.divergence))
    if precision not in form.divergence:
        raise UserError(f"format {name} has no precision {precision}; use {', '.join(form.divergence)}")
    checkpoint.require_name(out)
    companions = form.companions(out)
    if out.name.lower() in (path.name.lower() for path in companions):
        raise UserError(f"{out} is the name of a file that goes beside it; choose another --out")
    with writing(out):
        for path in (out, *companions):
            require_place(path, folder=form.is_folder, force=force, source=model.folder)
        with checkpoint.beside(out) as draft:
            order = form.write(model, draft / out.name, precision)
            ids = sample_ids(model)
            if order is None:
                theirs = form.logits(draft / out.name, ids)
            else:
                theirs = form.logits(draft / out.name, order[ids].tolist())[:, order]
            largest, divergence = differences(model.logits(ids), theirs)
            require_likeness(form, precision, largest, divergence)
            paths = [out.parent / path.name for path in sorted(draft.iterdir())]
            assert set(paths) <= {out, *companions}
            for path in paths:
                checkpoint.put(draft / path.name, path)
        for path in companions:
            if path not in paths:
                path.unlink(missing_ok=True)
    return Exported(paths, largest, divergence, len(ids))


def sample_ids(model: Portable) -> list[int]:
    """The beginning of a story, END in front."""
    story = SAMPLE.read_text(encoding="utf-8").split(END, 1)[0].strip()
    ids = [model.tokenizer.end_id, *model.tokenizer.encode(story)]
    return ids[: min(MOST_IDS, model.config.n_ctx)]


def differences(ours: Logits, theirs: Logits) -> tuple[float, float]:
    """Largest difference of logits (for logits up to 10; else relative), and mean KL divergence in nats."""
    if ours.shape != theirs.shape:
        raise UserError(f"the file gives logits of shape {theirs.shape}, not {ours.shape}")
    with np.errstate(invalid="ignore"):  # what is not a number is found out by the caller
        largest = float(np.abs(ours - theirs).max() / max(1, np.abs(ours).max() / 10))
        p, q = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1)[:, None] for x in (ours, theirs))
        return largest, float((np.exp(p) * (p - q)).sum(axis=1).mean())


def require_likeness(form: Format, precision: str, largest: float, divergence: float) -> None:
    rounded = form.divergence[precision]
    if not (divergence <= rounded if rounded else largest <= LARGEST):  # also where they are not numbers
        raise UserError(
            f"the file does not say what the model says (logits differ by up to {largest:.2g}, divergence"
            f" {divergence:.2g}); nothing was written"
        )
