"""Models beside the served one: checkpoints of runs, and that of --compare. Used in the lab's thread only."""

import dataclasses
from collections import OrderedDict
from pathlib import Path

import numpy as np

from tinystories.checkpoint import read_model
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.trace.model import TraceModel
from tinystories.errors import UserError
from tinystories.explain.text_trace import TextTrace, trace_text
from tinystories.serve.lab.run_metrics import RunProblemError
from tinystories.serve.lab.runs import Run, is_inside
from tinystories.weights.load import load_fp32

MAX_MODEL_BYTES = 1 << 30  # of the files of one model
MAX_KEPT_BYTES = 1 << 30  # of the weights that are kept for the next question
MAX_KEPT = 8


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A model that can be traced, with its tokenizer and the name that the page shows."""

    name: str
    tokenizer: Tokenizer
    model: TraceModel

    def trace(self, text: str) -> TextTrace:
        """Return the trace of END and a text; of one beyond the context, the last n_ctx tokens."""
        return trace_text(self.model, self.tokenizer, text, window=True)


class OtherModels:
    """Loads models in fp32 and keeps those used last."""

    def __init__(self, compare_model: Path | None) -> None:
        self.compare_model = compare_model
        self.kept: OrderedDict[tuple[Path, int, int], tuple[TracedModel, int]] = OrderedDict()

    def load_compared(self) -> TracedModel:
        """Return the model of --compare."""
        if self.compare_model is None:
            raise RunProblemError("the server was started without a second model (--compare MODEL)")
        return self._load(self.compare_model, self.compare_model.resolve().name, None)

    def load_checkpoint(self, run: Run, step: int | None) -> TracedModel:
        """Return the model of a checkpoint of a run, by default the newest."""
        folder = run.checkpoint(step)
        name = run.name if step is None else f"{run.name}, step {step:,}"
        return self._load(folder, name, run.root)

    def _load(self, folder: Path, name: str, root: Path | None) -> TracedModel:
        """Return a model directory; with a root, none of its files may be outside of it. Messages have no paths."""
        try:
            status = (folder / "config.json").stat()
            key = (folder, status.st_mtime_ns, status.st_ino)
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key][0]
            paths = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
            if root is not None and not all(is_inside(root, path) for path in paths):
                raise RunProblemError(f"{name}: a file of this model is a link out of the folder of runs")
            if sum(path.stat().st_size for path in paths) > MAX_MODEL_BYTES:
                raise RunProblemError(
                    f"{name}: this model is larger than {MAX_MODEL_BYTES >> 30} GB, too large for the lab"
                )
            files = read_model(folder)
            # Copies: a training may remove or replace the files at any moment.
            weights = {weight: np.array(array) for weight, array in load_fp32(files).items()}
            loaded = TracedModel(name, files.tokenizer(), TraceModel(files.config, weights))
        except OSError:
            raise RunProblemError(f"{name}: this model was removed while it was read; choose another one") from None
        except UserError as error:
            message = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
            raise RunProblemError(f"{name}: this model cannot be used: {message}") from None
        self.kept[key] = (loaded, sum(array.nbytes for array in weights.values()))
        while len(self.kept) > 1 and (
            len(self.kept) > MAX_KEPT or sum(n_bytes for _, n_bytes in self.kept.values()) > MAX_KEPT_BYTES
        ):
            self.kept.popitem(last=False)
        return loaded
