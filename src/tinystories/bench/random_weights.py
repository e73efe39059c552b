"""Random weights for speed benchmarks (speed does not depend on their values)."""

from pathlib import Path

import numpy as np

from tinystories.checkpoint import save_weights
from tinystories.config import ModelConfig
from tinystories.weights.names import expected_shapes


def write_random_weights(config: ModelConfig, path: Path) -> None:
    """Write random weights as safetensors, the same on every call.

    Matrices are normal with standard deviation 1 / sqrt(fan-in), which preserves the scale of activations; norm weights
    are 1 and biases 0.
    """
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            weights[name] = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)
        else:
            weights[name] = np.full(shape, 0 if name.endswith("bias") else 1, dtype=np.float32)
    save_weights(path, weights)
