"""Load nanoGPT's model from its own model.py, for the benchmarks that compare with it."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

from tinystories.errors import UserError


def load_nanogpt(path: Path, **settings: Any) -> Any:
    """Build the GPT of nanoGPT's model.py at `path` with these GPTConfig settings, discarding what it prints."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; pass nanoGPT's model.py with --nanogpt")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**settings))


def build_nanogpt_optimizer(
    model: Any, learning_rate: float, betas: tuple[float, float], device: str
) -> torch.optim.Optimizer:
    """Return nanoGPT's AdamW with weight decay 0.1, fused on the CPU too (nanoGPT itself fuses only on CUDA)."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: torch.optim.Optimizer = model.configure_optimizers(0.1, learning_rate, betas, device)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    return optimizer
