"""The one place where device and precision are decided, for training and generation alike."""

import sys
from pathlib import Path
from typing import Literal

import torch

from tinystories.errors import UserError

Precision = Literal["fp32", "bf16"]

NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's; x86 and ARM names do not clash


def select_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; any other name is taken at its word or refused."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} is not known; use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name}: no CUDA device is available here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: there are only {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name}: Apple's MPS is not available here; use auto or cpu")
    return device


def select_precision(device: torch.device, name: str = "auto") -> Precision:
    """`auto` is bf16 on CUDA devices that have it, fp32 everywhere else."""
    if name == "fp32":
        return "fp32"
    if name not in ("auto", "bf16"):
        raise UserError(f"precision {name} is not known to the torch engine; use auto, fp32 or bf16")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if name == "auto":
        return "fp32"
    # Without native support a CPU emulates bf16: a product that takes a tenth of a second in fp32 takes minutes.
    if device.type == "cpu" and has_native_bf16(read_cpu_info()):
        return "bf16"
    raise UserError(f"precision bf16: this {device.type} device has no native bf16; use fp32 or auto")


def has_native_bf16(cpu_info: str) -> bool:
    """Whether a text like /proc/cpuinfo (x86 `flags`, ARM `Features`) lists bf16 instructions."""
    return any(
        NATIVE_BF16_FLAGS & set(line.partition(":")[2].split())
        for line in cpu_info.splitlines()
        if line.lower().startswith(("flags", "features"))
    )


def read_cpu_info() -> str:
    """/proc/cpuinfo; empty where there is none, so that bf16 is refused rather than guessed."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if sys.platform == "linux" and path.exists() else ""
