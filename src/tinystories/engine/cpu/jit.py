"""Load the machine code of an entry point of `kernels`: made ahead of time (`objects`), cached, or compiled now.

Code that is compiled here is specific to a processor (`target`) and cached in a file; its name contains a hash of
everything it depends on. llvmlite alone loads it: importing Numba would dominate the start-up time.
"""

import concurrent.futures
import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from tinystories.engine.cpu.compiler import ENTRY_POINTS, Request
from tinystories.engine.cpu.objects import compile_in_process, find_object, hash_sources, load_object, require_compiler
from tinystories.engine.cpu.target import Target, select_target
from tinystories.errors import UserError
from tinystories.files import atomic_file

log = logging.getLogger(__name__)

MAX_CACHED_FILES = 32  # of other versions and environments, five for each; the oldest are deleted
_alive: list[Any] = []  # execution engines, which own the memory of the machine code
Forward = Callable[[int, int, float, int, int, int, int], None]
Sample = Callable[[int, int, int, int, int, int, int, int, int, int], None]


def cache_folder() -> Path:
    """Return the folder of cached object files: $TINYSTORIES_CACHE, or the user's cache folder of the platform."""
    if override := os.environ.get("TINYSTORIES_CACHE"):
        return Path(override)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tinystories"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tinystories"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystories"


def cache_path(entry_point: str) -> Path:
    """Return the path of a cached file, named by a hash of target, NUMBA_* variables, versions and sources.

    Raises UserError if TINYSTORIES_CPU names a level that this machine does not have.
    """
    target = select_target()
    key_parts = [target.level or "", target.processor, target.features, platform.machine(), sys.platform]
    key_parts += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        key_parts += [installed_version("numba")]
    key_parts += [installed_version("llvmlite"), sys.version.split()[0], hash_sources()]
    digest = hashlib.sha256("\n".join(key_parts).encode())
    return cache_folder() / f"forward-{entry_point}-{digest.hexdigest()[:32]}.o"


@functools.cache
def installed_version(package: str) -> str:
    """Return what `metadata.version` does, which takes 8 ms: it parses the whole description as an e-mail.

    Raises PackageNotFoundError if the package is not installed.
    """
    distribution = metadata.distribution(package)
    match = re.search(r"^Version: (\S+)$", distribution.read_text("METADATA") or "", re.MULTILINE)
    return match[1] if match else distribution.version


def compile_object(entry_point: str) -> bytes:
    """Compile an entry point for the target of this process, as `compiler.compile_entry_point` does; takes seconds."""
    return compile_in_process(Request(entry_point), numba_variables(select_target()))


def numba_variables(target: Target) -> dict[str, str]:
    """Return the environment variables by which Numba compiles for a level; none without a level."""
    if target.level is None:
        return {}
    return {"NUMBA_CPU_NAME": target.processor, "NUMBA_CPU_FEATURES": target.features, "NUMBA_ENABLE_AVX": "1"}


def load_or_compile(entry_point: str) -> bytes:
    """Return the contents of the cached file of an entry point, or compile and cache it.

    The file ends with its SHA-256. A damaged file is replaced; if it cannot be written, a warning is logged. Raises
    UserError if it belongs to another user, since it is code that would be executed, or if this machine does not have
    the level that TINYSTORIES_CPU names.
    """
    path: Path | None = None
    try:
        path = cache_path(entry_point)
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{path} is executable code of another user; set TINYSTORIES_CACHE to a folder of your own")
        data = path.read_bytes()
        content, digest = data[:-32], data[-32:]
        if hashlib.sha256(content).digest() == digest:
            return content
        log.warning("%s is damaged; compiling it again", path)
    except (OSError, RuntimeError):  # not cached yet, or no home folder
        pass
    require_compiler()
    # A warning, because Python shows it also where logging is not configured: nothing else tells why the start is slow.
    # Sampling, which follows, takes a sixth of the time.
    level = logging.INFO if entry_point == "sample" else logging.WARNING
    log.log(level, "compiling the CPU engine for this machine (%s, once, about 10 s) ...", entry_point)
    started_at = time.perf_counter()
    content = compile_object(entry_point)
    log.info("compiled in %.1f s", time.perf_counter() - started_at)
    try:
        if path is None:
            raise OSError("no home folder")
        store_in_cache(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        log.warning(
            "cannot cache the compiled code (%s): the next start compiles again; set TINYSTORIES_CACHE to a folder",
            error,
        )
    return content


def store_in_cache(path: Path, content: bytes) -> None:
    """Write a file atomically (safe if several processes do so at once) and delete the oldest cached object files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, concurrent=True, private=True, sync=False) as file:
        file.write(content)
    with contextlib.suppress(FileNotFoundError):  # another process or thread has deleted it
        cached_files = sorted(path.parent.glob("forward-*.o"), key=lambda cached_file: cached_file.stat().st_mtime)
        for other in cached_files[:-MAX_CACHED_FILES]:
            other.unlink(missing_ok=True)


def resolve_symbol(symbol: str) -> int:
    """Return the address of a function that the machine code refers to.

    Raises UserError if there is none, because the linker would silently use address 0.
    """
    if sys.platform == "win32":
        candidates = [(ctypes.windll.kernel32, "SwitchToThread" if symbol == "sched_yield" else symbol)]  # type: ignore[attr-defined]
        candidates += [(ctypes.cdll.msvcrt, symbol), (ctypes.cdll.ucrtbase, symbol)]
    else:
        candidates = [(ctypes.CDLL(None), symbol)]
    for library, name in candidates:
        if hasattr(library, name):
            return function_address(getattr(library, name))
    if (library_name := ctypes.util.find_library("m")) and hasattr(ctypes.CDLL(library_name), symbol):
        return function_address(getattr(ctypes.CDLL(library_name), symbol))
    raise UserError(f"the CPU engine needs the function {symbol} of the C library; use --engine torch")


def function_address(function: Any) -> int:
    """Return the address of a ctypes function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def load_forward(precision: str) -> Forward:
    """Return the entry point of the forward pass in a precision, one of those in `compiler.ENTRY_POINTS`.

    Its arguments are those of `forward.make_entry_point`: address of the model table, address of the call table, norm
    eps, address of the work queue, epoch, number of pieces, thread. Being a ctypes function, it releases the GIL during
    a call.
    """
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, *[ctypes.c_int64] * 4)
    return prototype(load_entry_point(precision))


def load_sample() -> Sample:
    """Return the entry point of sampling, a ctypes function; its arguments: `sampling.make_sampling_entry_point`."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(load_entry_point("sample"))


@functools.cache
def load_entry_point(name: str) -> int:
    """Load the machine code of an entry point (compile it if needed) and return its address."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    content = load_object(select_target(), name) or load_or_compile(name)
    header, _, machine_code = content.partition(b"\n")
    entry = json.loads(header)
    for symbol in entry["calls"]:
        if llvm.address_of_symbol(symbol) is None:
            llvm.add_symbol(symbol, resolve_symbol(symbol))
    target_machine = llvm.Target.from_default_triple().create_target_machine()
    execution_engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine)
    execution_engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    execution_engine.finalize_object()
    _alive.append(execution_engine)
    return execution_engine.get_function_address(entry["symbol"])


def prepare(entry_points: Iterable[str] = ENTRY_POINTS) -> Path:
    """Compile what is neither made ahead of time nor cached; return where the code is: a file of objects, or a folder.

    Raises UserError if the code cannot be cached.
    """
    target = select_target()
    missing = [name for name in entry_points if load_object(target, name) is None]
    if not missing and (path := find_object(target)):
        return path
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(load_or_compile, missing):
            pass
    if not all(cache_path(name).exists() for name in missing):
        raise UserError(f"{cache_folder()} cannot be written: set TINYSTORIES_CACHE to a writable folder")
    return cache_folder()


def describe_code(precision: str = "int8") -> str:
    """Return where the code of an entry point comes from, for people."""
    target = select_target()
    if path := find_object(target):
        return f"made ahead of time for {path.stem}"
    if cache_path(precision).exists():
        return f"compiled on this machine ({cache_path(precision)})"
    return "none yet: the first use compiles it (`tinystories warmup`)"
