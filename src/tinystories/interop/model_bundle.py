"""A model as every file format sees it: sizes, NumPy weights, a tokenizer. No torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu.engine import CpuEngine, CpuKVCache
from tinystories.engine.cpu.weights import expected_shapes, load_fp32
from tinystories.errors import UserError, quoted

Array = npt.NDArray[Any]

# What a file may claim, before anything is made for each of them.
MAX_CONTEXT = 1 << 20  # tokens
MAX_LAYERS = 1024  # layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """Weights: fp32, by their names in `model.safetensors`; a tied head is not among them.

    `folder`: the model directory it was read from, and may still be mapped from.
    """

    config: ModelConfig
    weights: Mapping[str, Array]
    tokenizer: Tokenizer
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def read(cls, folder: Path | str) -> "ModelBundle":
        """From a model directory; the weights stay mapped."""
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
        """As a model directory, whole or not at all. `UserError` unless the parts fit each other."""
        self.check()
        with checkpoint.atomic_directory(folder) as staging_dir:
            weights = {name: np.ascontiguousarray(weight, np.float32) for name, weight in self.weights.items()}
            checkpoint.write_arrays(staging_dir, self.config, weights, self.tokenizer, self.sampling, self.provenance)

    def check(self) -> None:
        """`UserError` unless all weights are there, of the right shapes and finite, and the tokenizer's ids fit."""
        expected = expected_shapes(self.config)
        for name in sorted(expected.keys() | self.weights.keys()):
            if name not in self.weights or name not in expected:
                raise UserError(f"weight {quoted(name)} is {'unknown' if name in self.weights else 'missing'}")
            if self.weights[name].shape != expected[name]:
                raise UserError(f"weight {name} is {self.weights[name].shape}, not {expected[name]}")
            if not np.isfinite(self.weights[name]).all():
                raise UserError(f"weight {name} holds numbers that are not finite; use another checkpoint")
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size:,} ids, the model only {self.config.vocab_size:,};"
                " they do not belong together"
            )

    def logits(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """(T, V) logits of our own engine in fp32 after each of the ids."""
        engine = CpuEngine(self.config, self.weights)
        chunks = engine.forward_chunks(CpuKVCache(self.config, 1), 0, np.asarray(ids, np.int64), all_logits=True)
        return np.concatenate([logits for _, logits in chunks])
