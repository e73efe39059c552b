"""`ModelBundle`: a model as all file formats see it. Config, NumPy weights and tokenizer, without torch."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.config_file import build_dataclass
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu.engine import CpuEngine, CpuKVCache
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.files import atomic_directory
from tinystories.weights.load import load_fp32
from tinystories.weights.names import check_weights

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)

# The most that a file may claim; checked before anything is allocated.
MAX_LAYERS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A model in memory, independent of any file format.

    `weights`: fp32 arrays by their names in `model.safetensors`, without a tied LM head.
    `folder`: the model directory it was read from, to which `weights` may still be memory-mapped.
    `title`, `license`: what an export tells its readers, where the format has a place for it; "" if nothing is known.
    """

    config: ModelConfig
    weights: Mapping[str, Array]
    tokenizer: Tokenizer
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    title: str = ""
    license: str = ""

    @classmethod
    def read(cls, folder: Path | str) -> "ModelBundle":
        """Read a model directory; the weights stay memory-mapped."""
        files = checkpoint.read_model(folder)
        return cls(
            config=files.config,
            weights=load_fp32(files),
            tokenizer=files.tokenizer(),
            sampling=files.sampling,
            provenance=files.provenance,
            folder=files.folder,
        )

    def write(self, folder: Path) -> None:
        """Write a model directory atomically, after `check`."""
        self.check()
        with atomic_directory(folder) as staging_dir:
            weights = {name: np.ascontiguousarray(weight, np.float32) for name, weight in self.weights.items()}
            checkpoint.write_arrays(staging_dir, self.config, weights, self.tokenizer, self.sampling, self.provenance)

    def check(self, where: object = "the model") -> None:
        """Raise `UserError` if a weight is missing, unknown, misshapen or not finite, or the tokenizer is too large."""
        check_weights({name: weight.shape for name, weight in self.weights.items()}, self.config, str(where))
        for name, weight in self.weights.items():
            if not np.isfinite(weight).all():
                raise UserError(f"{where}: weight {name} contains NaN or infinity (not finite); use another checkpoint")
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{where}: the tokenizer has {self.tokenizer.vocab_size:,} ids, the model only"
                f" {self.config.vocab_size:,}; use the model's own tokenizer"
            )

    def logits(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return (T, V) logits of our CPU engine in fp32, one row for each of the T ids."""
        engine = CpuEngine(self.config, self.weights, EngineConfig(n_slots=1))
        chunks = engine.forward_chunks(CpuKVCache(self.config, 1), 0, np.asarray(ids, np.int64), all_logits=True)
        return np.concatenate([logits for _, logits in chunks])


def parse_sampling(settings: Mapping[str, Any], where: object) -> SamplingConfig:
    """Return another program's sampling settings, given by our names, with our defaults for those that are None.

    A value that we cannot use is left out with a warning, since it says nothing about the weights.
    """
    usable: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        try:
            build_dataclass(SamplingConfig, {name: value}, str(where))
            usable[name] = value
        except UserError as error:
            log.warning("%s; using the default, %s", error, getattr(SamplingConfig(), name))
    return build_dataclass(SamplingConfig, usable, str(where))
