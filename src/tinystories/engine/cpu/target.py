"""The processor that the kernels are compiled for: this machine's own, or a level named by `TINYSTORIES_CPU`."""

import ctypes
import os
import platform
import sys
from typing import NamedTuple

import llvmlite.binding as llvm

from tinystories.errors import UserError, quoted

VARIABLE = "TINYSTORIES_CPU"
AT_HWCAP, HWCAP_ASIMDDP = 16, 1 << 20  # of Linux on ARM: what `getauxval` returns for the first has this bit
NUMBA_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")


class Level(NamedTuple):
    """A set of instructions: LLVM's name of a processor that has just these, and the features to name beside it."""

    processor: str
    features: str  # what `simd.has_feature` looks for must be here, although the processor's name implies it
    required: frozenset[str]  # LLVM's names of what a machine needs to run it


X86_64_V2 = frozenset({"cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"})
X86_64_V3 = X86_64_V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"}
X86_64_V4 = X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
V3_FEATURES, V4_FEATURES = "+avx2,+fma,+f16c", "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl"
# fast-dpwssd: without it LLVM replaces some of the `vpdpwssd` by two instructions, as if latency counted here.
VNNI_TUNING = "+fast-dpwssd"
X86_LEVELS = {
    "x86-64": Level("x86-64", "", frozenset()),
    "x86-64-v2": Level("x86-64-v2", "", X86_64_V2),
    "avx2": Level("x86-64-v3", V3_FEATURES, X86_64_V3),
    "avx2-vnni": Level("x86-64-v3", f"{V3_FEATURES},+avxvnni,{VNNI_TUNING}", X86_64_V3 | {"avxvnni"}),
    "avx512": Level("x86-64-v4", V4_FEATURES, X86_64_V4),
    "avx512-vnni": Level("x86-64-v4", f"{V4_FEATURES},+avx512vnni,{VNNI_TUNING}", X86_64_V4 | {"avx512vnni"}),
}
ARM_LEVELS = {
    "neon": Level("generic", "+neon", frozenset()),
    "neon-dotprod": Level("generic", "+neon,+dotprod", frozenset({"dotprod"})),
}
LEVELS = X86_LEVELS | ARM_LEVELS


class Target(NamedTuple):
    """What the kernels are compiled for. `level` is None unless `TINYSTORIES_CPU` sets it: Numba then chooses."""

    level: str | None
    processor: str  # LLVM's name
    features: str
    best_level: str  # of this machine; "other" on a processor without levels, "chosen by Numba" with its variables
    reason: str  # why this target, for people

    def as_facts(self) -> dict[str, str]:
        """Return what `tinystories info` prints."""
        return {"level": self.level or self.best_level, "processor": self.processor, "reason": self.reason}


def select_target() -> Target:
    """Return the target of this process, from `TINYSTORIES_CPU`, Numba's own variables, or the processor.

    Raises `UserError` if the level is unknown or this machine does not have it.
    """
    host_features = read_host_features()
    available_levels = list_available_levels(llvm.get_default_triple(), host_features)
    best_level = available_levels[-1] if available_levels else "other"
    if name := os.environ.get(VARIABLE):
        check_level(name, available_levels)
        level = LEVELS[name]
        return Target(name, level.processor, level.features, best_level, f"set by {VARIABLE}; otherwise {best_level}")
    reason = "the best that this processor has"
    if variables := [variable for variable in NUMBA_VARIABLES if variable in os.environ]:
        reason = f"set by {' and '.join(variables)}; otherwise {best_level}"
        best_level = "chosen by Numba"
    processor = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = ",".join(f"{'+' if has else '-'}{feature}" for feature, has in sorted(host_features.items()))
    return Target(None, processor, os.environ.get("NUMBA_CPU_FEATURES", features), best_level, reason)


def check_level(name: str, available_levels: list[str]) -> None:
    """Raise `UserError` unless this is a level of this machine."""
    if name not in LEVELS:
        raise UserError(f"{VARIABLE}={quoted(name)} is unknown; use one of {', '.join(LEVELS)}, or unset it")
    if name not in available_levels:
        available = f"; it has {', '.join(available_levels)}" if available_levels else ""
        raise UserError(
            f"{VARIABLE}={name}: this processor ({llvm.get_host_cpu_name()}) does not have it{available}; unset the"
            " variable to use the best"
        )


def read_host_features() -> dict[str, bool]:
    """Return LLVM's names of processor features and whether this machine has each; empty where LLVM cannot tell.

    A feature whose registers the operating system does not save is reported as missing.
    """
    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:
        features = {}
    if sys.platform == "linux" and platform.machine() == "aarch64":  # LLVM does not report it there
        features["dotprod"] = bool(ctypes.CDLL(None).getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
    return features


def list_available_levels(triple: str, host_features: dict[str, bool]) -> list[str]:
    """Return the levels that a machine with this LLVM triple and these features can run, slowest first."""
    architecture = triple.split("-")[0]
    features = {feature for feature, has in host_features.items() if has}
    levels: dict[str, Level] = {}
    if architecture in ("aarch64", "arm64"):
        levels = ARM_LEVELS
    elif architecture in ("x86_64", "amd64"):
        levels = X86_LEVELS
    return [name for name, level in levels.items() if level.required <= features]
