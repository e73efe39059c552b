"""Select and load an inference engine. Does not import torch unless it is selected: the import alone takes seconds."""

import ctypes
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Literal

from tinystories.checkpoint import ModelFiles, read_model
from tinystories.engine.engine_config import QUANTIZED_PRECISIONS, EngineConfig
from tinystories.engine.protocol import Engine
from tinystories.errors import UserError

EngineName = Literal["torch", "cpu"]


def select_engine(config: EngineConfig) -> EngineName:
    """Return the engine to use. `auto` is the torch engine if CUDA and torch with GPU support are available, or if bf16
    or a device other than the CPU is requested; otherwise the CPU engine.
    """
    if config.engine == "cpu":
        return "cpu"
    device = str(config.device)
    if config.engine == "torch" or config.precision == "bf16" or device not in ("auto", "cpu"):
        return "torch"
    may_use_gpu = device == "auto" and config.precision not in QUANTIZED_PRECISIONS
    return "torch" if may_use_gpu and is_gpu_torch_available() and has_cuda() else "cpu"


def is_gpu_torch_available() -> bool:
    """Return whether torch and jaxtyping are installed and torch is not a CPU-only build (without importing them)."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("jaxtyping")):
        return False
    return "+cpu" not in importlib.metadata.version("torch")


def has_cuda() -> bool:
    """Return whether the NVIDIA driver is installed and reports at least one device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def load_engine(model: str | Path, config: EngineConfig) -> tuple[ModelFiles, Engine]:
    """Read a model directory and load an engine for it.

    Raises `UserError` if the model is missing or damaged, or if the engine does not support the request or cannot run
    on this machine.
    """
    if select_engine(config) == "cpu":
        from tinystories.engine.cpu.engine import CpuEngine
        from tinystories.engine.cpu.shortlist import read_shortlist

        files = read_model(model, verify_weights=False)
        shortlist_ids = read_shortlist(files) if config.shortlist else None
        return files, CpuEngine.load(files, config, shortlist_ids=shortlist_ids)
    config.check_torch()
    files = read_model(model)
    try:
        from tinystories.engine.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "jaxtyping"):
            raise
        install_command = 'pip install "tinystories-gpt[train]"'
        raise UserError(
            f"the torch engine needs {error.name}, which is not installed; run: {install_command}"
        ) from None
    return files, TorchEngine.load(files, config)
