"""Select and load an inference engine. Does not import torch unless it is selected: the import alone takes seconds."""

import ctypes
import importlib.metadata
import importlib.util
import sys
from typing import Any, Literal

from tinystories.checkpoint import ModelFiles, read_model
from tinystories.engine.protocol import Engine
from tinystories.errors import UserError

EngineName = Literal["torch", "cpu"]
ENGINES = ("auto", "cpu", "torch")
ENGINE_PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
QUANTIZED_PRECISIONS = ("int8", "int4")


def select_engine(name: str = "auto", device: Any = "auto", precision: str = "auto") -> EngineName:
    """Return the engine to use. `auto` is the torch engine if CUDA and torch with GPU support are available, or if bf16
    or a device other than the CPU is requested; otherwise the CPU engine.

    Raises `UserError` for unknown names and for a device or precision that the engine does not support.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name} is unknown; use one of {', '.join(ENGINES)}")
    if precision not in ENGINE_PRECISIONS:
        raise UserError(f"precision {precision} is unknown; use one of {', '.join(ENGINE_PRECISIONS)}")
    device = str(device)
    if name == "cpu" and device not in ("auto", "cpu"):
        raise UserError(f"the CPU engine does not run on device {device}; use --engine torch")
    if name == "cpu" and precision == "bf16":
        raise UserError("the CPU engine does not support bf16; use fp32, int8 or int4, or --engine torch")
    if name == "torch" and precision in QUANTIZED_PRECISIONS:
        raise UserError(f"the torch engine does not support {precision}; use fp32 or bf16, or --engine cpu")
    if name == "cpu":
        return "cpu"
    if name == "torch" or precision == "bf16" or device not in ("auto", "cpu"):
        return "torch"
    return (
        "torch"
        if device == "auto" and precision not in QUANTIZED_PRECISIONS and is_gpu_torch_available() and has_cuda()
        else "cpu"
    )


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


def load_engine(
    model: Any,
    *,
    engine: str,
    device: Any,
    precision: str,
    n_slots: int,
    threads: int | None = None,
    shortlist: bool = False,
) -> tuple[ModelFiles, Engine]:
    """Read a model directory and load an engine for it.

    `shortlist` restricts generation to the ids of the model's shortlist; `threads` is only for the CPU engine.

    Raises `UserError` if the model is missing or damaged, or if the engine does not support the request or cannot run
    on this machine.
    """
    if select_engine(engine, device, precision) == "cpu":
        from tinystories.engine.cpu import shortlist as short
        from tinystories.engine.cpu.engine import CpuEngine

        files = read_model(model, check_weights=False)
        cpu_precision: Any = "int8" if precision == "auto" else precision
        shortlist_ids = short.read_shortlist(files) if shortlist else None
        return files, CpuEngine.load(
            files, precision=cpu_precision, n_slots=n_slots, threads=threads, shortlist=shortlist_ids
        )
    if shortlist:
        raise UserError("--shortlist is for the CPU engine: add --engine cpu")
    if threads is not None:
        raise UserError("--threads is for the CPU engine; set OMP_NUM_THREADS for the torch engine")
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
    return files, TorchEngine.load(files, n_slots=n_slots, device=device, precision=precision)
