"""Machine code of `forward`: made by Numba once, kept on disk, and loaded without Numba, whose import takes longest.

The file is an object file of this very processor; its name holds a hash of everything it depends on.
"""

import ctypes
import ctypes.util
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from tinystories.errors import UserError

log = logging.getLogger(__name__)

SOURCE_FILES = ("layout.py", "kernels.py", "simd.py", "jit.py")
MAX_CACHED_FILES = 8  # of other versions and environments
_alive: list[Any] = []  # owners of the memory of machine code
# What Numba's code names for exceptions and for arrays that own memory: here there are none. Numba registers its own
# when it is imported.
UNUSED_SYMBOL_PREFIXES = ("NRT_", "numba_")
Forward = Callable[[int, int, float, int, int], None]


def cache_folder() -> Path:
    """Where machine code is kept: $TINYSTORIES_CACHE, or the user's cache folder of the operating system."""
    if override := os.environ.get("TINYSTORIES_CACHE"):
        return Path(override)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tinystories"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tinystories"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystories"


def cache_path() -> Path:
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know them on all platforms; Numba then uses none
        features = ""
    key_parts = [llvm.get_host_cpu_name(), features, platform.machine(), sys.platform]
    key_parts += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    key_parts += [metadata.version("numba"), metadata.version("llvmlite"), sys.version.split()[0]]
    digest = hashlib.sha256("\n".join(key_parts).encode())
    for name in SOURCE_FILES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return cache_folder() / f"forward-{digest.hexdigest()[:32]}.o"


def compile_object() -> bytes:
    """A line of JSON (the function's name, and those of other functions that it may call) and an object file.

    Takes seconds.
    """
    from tinystories.engine.cpu.kernels import make_entry_point

    entry = make_entry_point()
    library = entry._library
    _, kind, (machine_code, _) = library.serialize_using_object_code()
    assert kind == "object"
    calls = [f.name for f in library._final_module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    header = {"name": entry.native_name, "calls": calls}
    return json.dumps(header).encode() + b"\n" + bytes(machine_code)


def load_or_compile() -> bytes:
    """From disk where it is whole, else made and kept. A folder that cannot be written to costs the time again."""
    path: Path | None = None
    try:
        path = cache_path()
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{path} belongs to another user, and is code: set TINYSTORIES_CACHE to a folder of yours")
        data = path.read_bytes()
        content, digest = data[:-32], data[-32:]
        if hashlib.sha256(content).digest() == digest:
            return content
        log.warning("%s is damaged; it is made again", path)
    except (OSError, RuntimeError):  # not there, or no home folder to look in
        pass
    log.info("compiling the CPU engine for this machine, once (some seconds) ...")
    started_at = time.perf_counter()
    content = compile_object()
    log.info("compiled in %.1f s", time.perf_counter() - started_at)
    try:
        if path is None:
            raise OSError("there is no home folder; set TINYSTORIES_CACHE")
        store_in_cache(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        log.warning(
            "the machine code cannot be kept (%s): the next start compiles again; TINYSTORIES_CACHE names a folder",
            error,
        )
    return content


def store_in_cache(path: Path, content: bytes) -> None:
    """Write whole or not at all; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temp_path = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(temp_path, path)
    except BaseException:
        os.unlink(temp_path)
        raise
    cached_files = sorted(path.parent.glob("forward-*.o"), key=lambda cached_file: cached_file.stat().st_mtime)
    for other in cached_files[:-MAX_CACHED_FILES]:
        other.unlink(missing_ok=True)


@ctypes.CFUNCTYPE(None)
def abort_stub() -> None:
    os.abort()


def resolve_symbol(symbol: str) -> int:
    """Of a function that machine code may call: the linker would take an unknown one for 0 and say nothing."""
    if symbol.startswith(UNUSED_SYMBOL_PREFIXES):
        return function_address(abort_stub)
    if symbol.startswith("Py"):
        return function_address(getattr(ctypes.pythonapi, symbol))
    if sys.platform == "win32":
        candidates = [(ctypes.windll.kernel32, "SwitchToThread" if symbol == "sched_yield" else symbol)]  # type: ignore[attr-defined]
        candidates.append((ctypes.cdll.msvcrt, symbol))
    else:
        candidates = [(ctypes.CDLL(None), symbol)]
    for library, name in candidates:
        if hasattr(library, name):
            return function_address(getattr(library, name))
    if (library_name := ctypes.util.find_library("m")) and hasattr(ctypes.CDLL(library_name), symbol):
        return function_address(getattr(ctypes.CDLL(library_name), symbol))
    raise UserError(f"the CPU engine needs the function {symbol} of the C library; use --engine torch")


def function_address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def load_forward() -> Forward:
    """The function; a call of it lets other Python threads run."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    header, _, machine_code = load_or_compile().partition(b"\n")
    header_fields = json.loads(header)
    for symbol in header_fields["calls"]:
        if llvm.address_of_symbol(symbol) is None:  # else Numba is here, and needs its own
            llvm.add_symbol(symbol, resolve_symbol(symbol))
    target_machine = llvm.Target.from_default_triple().create_target_machine()
    execution_engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine)
    execution_engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    execution_engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, ctypes.c_int64, ctypes.c_int64
    )
    function = prototype(execution_engine.get_function_address(header_fields["name"]))
    _alive.append(execution_engine)
    return function
