"""Which engine computes where the user leaves it open. Imports no torch: that alone takes seconds."""

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
    """`auto` is the CPU engine, but for a CUDA device (where torch is installed), other devices, and bf16."""
    if name not in ENGINES:
        raise UserError(f"engine {name} is not known; use one of {', '.join(ENGINES)}")
    if precision not in ENGINE_PRECISIONS:
        raise UserError(f"precision {precision} is not known; use one of {', '.join(ENGINE_PRECISIONS)}")
    device = str(device)
    if name == "cpu" and device not in ("auto", "cpu"):
        raise UserError(f"the CPU engine does not run on device {device}; use --engine torch")
    if name == "cpu" and precision == "bf16":
        raise UserError("the CPU engine has no precision bf16; use fp32, int8 or int4, or --engine torch")
    if name == "torch" and precision in QUANTIZED_PRECISIONS:
        raise UserError(f"the torch engine has no precision {precision}; use fp32 or bf16, or --engine cpu")
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
    """Whether the torch engine could run, and torch is not one for CPUs alone."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("jaxtyping")):
        return False
    return "+cpu" not in importlib.metadata.version("torch")


def has_cuda() -> bool:
    """Whether NVIDIA's driver is here and knows of a device."""
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
    """A model directory, and the engine over it, which writes only ids of the model's shortlist where that is wanted.

    `UserError` where it cannot run here.
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
        raise UserError("--threads is for the CPU engine; OMP_NUM_THREADS sets those of torch")
    files = read_model(model)
    try:
        from tinystories.engine.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "jaxtyping"):
            raise
        install_command = 'pip install "tinystories-gpt[train]"'
        raise UserError(f"the torch engine needs {error.name}, which is not installed: {install_command}") from None
    return files, TorchEngine.load(files, n_slots=n_slots, device=device, precision=precision)
