"""Select device and precision: the only place that decides them, for training and generation."""

import sys
from pathlib import Path
from typing import Literal

import torch

from tinystories.errors import UserError

Precision = Literal["fp32", "bf16"]

# CPU flags for native bf16: the first two are x86, the last is ARM; the names do not clash.
NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def select_device(name: str | torch.device = "auto") -> torch.device:
    """Return the torch device for a name. `auto` is CUDA if available, else MPS, else the CPU.

    Raises `UserError` if the name is unknown or the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")  # rejected below, like every other unsupported type
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} is unknown; use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name}: CUDA is not available on this machine; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: found only {torch.cuda.device_count()} CUDA device(s), numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name}: Apple's MPS is not available on this machine; use auto or cpu")
    return device


def select_precision(device: torch.device, name: str = "auto") -> Precision:
    """Return the precision of the torch engine. `auto` is bf16 on CUDA devices with native support, otherwise fp32.

    Raises `UserError` if the name is unknown or the device cannot compute in bf16 natively.
    """
    if name == "fp32":
        return "fp32"
    if name not in ("auto", "bf16"):
        raise UserError(f"the torch engine does not support precision {name}; use auto, fp32 or bf16")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if name == "auto":
        return "fp32"
    # Without native support a CPU emulates bf16: a matmul that takes 0.1 s in fp32 takes minutes.
    if device.type == "cpu" and has_native_bf16(read_cpu_info()):
        return "bf16"
    raise UserError(f"precision bf16: this {device.type} device does not support bf16 natively; use fp32 or auto")


def has_native_bf16(cpu_info: str) -> bool:
    """Return whether text in the format of /proc/cpuinfo (x86 `flags`, ARM `Features`) lists bf16 instructions."""
    return any(
        NATIVE_BF16_FLAGS & set(line.partition(":")[2].split())
        for line in cpu_info.splitlines()
        if line.lower().startswith(("flags", "features"))
    )


def read_cpu_info() -> str:
    """Return the text of /proc/cpuinfo, or "" if it does not exist: bf16 is then rejected instead of guessed."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if sys.platform == "linux" and path.exists() else ""
