"""Weights that nobody trained, for measurements of speed: it does not depend on them."""

from pathlib import Path

import numpy as np

from tinystories.config import ModelConfig
from tinystories.engine.cpu.weights import expected_shapes, write_safetensors


def write_random_weights(config: ModelConfig, path: Path) -> None:
    """Normal matrices that keep the size of what goes through them, norms of 1, biases of 0; the same each time."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            weights[name] = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)
        else:
            weights[name] = np.full(shape, 0 if name.endswith("bias") else 1, dtype=np.float32)
    write_safetensors(path, weights, {"format": "pt"})
