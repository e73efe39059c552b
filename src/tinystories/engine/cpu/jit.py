"""Compile `kernels` once with Numba, cache the object file, and load it with llvmlite alone.

Importing Numba would dominate the start-up time. The object file is specific to a processor (`target`); its name
contains a hash of everything it depends on.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from tinystories.engine.cpu.target import VARIABLE, Target, select_target
from tinystories.errors import UserError
from tinystories.files import atomic_file
from tinystories.weights.quantize import BLOCK_ROWS, GROUP_SIZE, INT8_BLOCK_ROWS

log = logging.getLogger(__name__)

SOURCE_FILES = (Path(__file__), *sorted((Path(__file__).parent / "kernels").glob("*.py")))
MAX_CACHED_FILES = 8  # object files of other versions and environments; the oldest are deleted
_alive: list[Any] = []  # execution engines, which own the memory of the machine code
# Runtime functions of Numba for exceptions and for arrays that own memory. The object file refers to them but never
# calls them, so they resolve to `abort_stub`. If Numba is imported, it registers its own.
UNUSED_SYMBOL_PREFIXES = ("NRT_", "numba_")
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


def cache_path() -> Path:
    """Return the path of the object file, named by a hash of target, NUMBA_* variables, versions and sources.

    Raises UserError if TINYSTORIES_CPU names a level that this machine does not have.
    """
    target = select_target()
    key_parts = [target.level or "", target.processor, target.features, platform.machine(), sys.platform]
    key_parts += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    key_parts += [metadata.version("numba"), metadata.version("llvmlite"), sys.version.split()[0]]
    key_parts += [f"{BLOCK_ROWS} {INT8_BLOCK_ROWS} {GROUP_SIZE}"]  # compiled in as constants
    digest = hashlib.sha256("\n".join(key_parts).encode())
    for path in SOURCE_FILES:
        digest.update(path.read_bytes())
    return cache_folder() / f"forward-{digest.hexdigest()[:32]}.o"


def compile_object() -> bytes:
    """Compile `kernels`; return a line of JSON followed by an object file for each entry point. Takes some 10 seconds.

    The JSON lists the entry points: the `name` of each, the `size` of its object file in bytes, and in `calls` the
    external symbols that the code refers to. Raises UserError if TINYSTORIES_CPU names a level and Numba has already
    been set up for another processor.
    """
    target = select_target()
    with numba_target(target):
        from numba.core.registry import cpu_target

        from tinystories.engine.cpu.kernels.forward import make_entry_point
        from tinystories.engine.cpu.kernels.sampling import make_sampling_entry_point

        _, processor, features = cpu_target.target_context.codegen().magic_tuple()
        if target.level and (processor, features) != (target.processor, target.features):
            raise UserError(
                f"{VARIABLE}={target.level} cannot be compiled in this process, which uses Numba for {processor}; run"
                " `tinystories warmup` with the variable first"
            )
        entries, objects = [], b""
        for entry in (make_entry_point(), make_sampling_entry_point()):
            library = entry._library
            _, kind, (machine_code, _) = library.serialize_using_object_code()
            assert kind == "object"
            functions = library._final_module.functions
            calls = [f.name for f in functions if f.is_declaration and not f.name.startswith("llvm.")]
            entries.append({"name": entry.native_name, "size": len(machine_code), "calls": calls})
            objects += bytes(machine_code)
    return json.dumps(entries).encode() + b"\n" + objects


@contextlib.contextmanager
def numba_target(target: Target) -> Iterator[None]:
    """Let Numba compile for a level inside the block, by its own variables; without a level, leave it alone.

    Numba reads them when it is first imported, and stays with them.
    """
    if target.level is None:
        yield
        return
    values = {"NUMBA_CPU_NAME": target.processor, "NUMBA_CPU_FEATURES": target.features, "NUMBA_ENABLE_AVX": "1"}
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_or_compile() -> bytes:
    """Return the contents of the cached object file, or compile and cache it.

    The file ends with its SHA-256. A damaged file is replaced; if it cannot be written, a warning is logged. Raises
    UserError if it belongs to another user, since it is code that would be executed, or if this machine does not have
    the level that TINYSTORIES_CPU names.
    """
    path: Path | None = None
    try:
        path = cache_path()
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{path} is executable code of another user; set TINYSTORIES_CACHE to a folder of your own")
        data = path.read_bytes()
        content, digest = data[:-32], data[-32:]
        if hashlib.sha256(content).digest() == digest:
            return content
        log.warning("%s is damaged; compiling it again", path)
    except (OSError, RuntimeError):  # not cached yet, or no home folder
        pass
    # A warning, because Python shows it also where logging is not configured: nothing else tells why the start is slow.
    log.warning("compiling the CPU engine for this machine (once, about 25 s) ...")
    started_at = time.perf_counter()
    content = compile_object()
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
    cached_files = sorted(path.parent.glob("forward-*.o"), key=lambda cached_file: cached_file.stat().st_mtime)
    for other in cached_files[:-MAX_CACHED_FILES]:
        other.unlink(missing_ok=True)


@ctypes.CFUNCTYPE(None)
def abort_stub() -> None:
    """Abort the process: stands in for functions that must never be called."""
    os.abort()


def resolve_symbol(symbol: str) -> int:
    """Return the address of a function that the machine code refers to.

    Raises UserError if there is none, because the linker would silently use address 0.
    """
    if symbol.startswith(UNUSED_SYMBOL_PREFIXES):
        return function_address(abort_stub)
    if symbol.startswith("Py"):
        return function_address(getattr(ctypes.pythonapi, symbol))
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


def load_forward() -> Forward:
    """Return the entry point of the forward pass.

    Its arguments are those of `forward.make_entry_point`: address of the model table, address of the call table, norm
    eps, address of the work queue, epoch, number of pieces, thread. Being a ctypes function, it releases the GIL during
    a call.
    """
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, *[ctypes.c_int64] * 4)
    return prototype(load_entry_points()[0])


def load_sample() -> Sample:
    """Return the entry point of sampling, a ctypes function; its arguments: `sampling.make_sampling_entry_point`."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(load_entry_points()[1])


@functools.cache
def load_entry_points() -> list[int]:
    """Load the machine code (compile it if needed) and return the addresses of its entry points."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    header, _, objects = load_or_compile().partition(b"\n")
    entries = json.loads(header)
    for symbol in {symbol for entry in entries for symbol in entry["calls"]}:
        if llvm.address_of_symbol(symbol) is None:  # otherwise Numba is imported and has registered its own
            llvm.add_symbol(symbol, resolve_symbol(symbol))
    target_machine = llvm.Target.from_default_triple().create_target_machine()
    execution_engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine)
    start = 0
    for entry in entries:
        execution_engine.add_object_file(llvm.ObjectFileRef.from_data(objects[start : start + entry["size"]]))
        start += entry["size"]
    execution_engine.finalize_object()
    _alive.append(execution_engine)
    return [execution_engine.get_function_address(entry["name"]) for entry in entries]
