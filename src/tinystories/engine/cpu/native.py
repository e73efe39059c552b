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

SOURCES = ("fields.py", "forward.py", "intrinsics.py", "native.py")
KEPT_FILES = 8  # of other versions and environments
KEPT: list[Any] = []  # owners of the memory of machine code
# What Numba's code names for exceptions and for arrays that own memory: here there are none. Numba registers its own
# when it is imported.
NEVER_CALLED = ("NRT_", "numba_")
Forward = Callable[[int, int, float, int, int], None]


def cache_folder() -> Path:
    """Where machine code is kept: $TINYSTORIES_CACHE, or the user's cache folder of the operating system."""
    if given := os.environ.get("TINYSTORIES_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "tinystories"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/tinystories"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinystories"


def cached_path() -> Path:
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know them on all platforms; Numba then uses none
        features = ""
    facts = [llvm.get_host_cpu_name(), features, platform.machine(), sys.platform]
    facts += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_"))
    facts += [metadata.version("numba"), metadata.version("llvmlite"), sys.version.split()[0]]
    digest = hashlib.sha256("\n".join(facts).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return cache_folder() / f"forward-{digest.hexdigest()[:32]}.o"


def compiled() -> bytes:
    """A line of JSON (the function's name, and those of other functions that it may call) and an object file.

    Takes seconds.
    """
    from tinystories.engine.cpu.forward import make_entry

    entry = make_entry()
    library = entry._library
    _, kind, (machine_code, _) = library.serialize_using_object_code()
    assert kind == "object"
    calls = [f.name for f in library._final_module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    header = {"name": entry.native_name, "calls": calls}
    return json.dumps(header).encode() + b"\n" + bytes(machine_code)


def object_file() -> bytes:
    """From disk where it is whole, else made and kept. A folder that cannot be written to costs the time again."""
    path: Path | None = None
    try:
        path = cached_path()
        if hasattr(os, "getuid") and path.stat().st_uid not in (os.getuid(), 0):
            raise UserError(f"{path} belongs to another user, and is code: set TINYSTORIES_CACHE to a folder of yours")
        stored = path.read_bytes()
        content, digest = stored[:-32], stored[-32:]
        if hashlib.sha256(content).digest() == digest:
            return content
        log.warning("%s is damaged; it is made again", path)
    except (OSError, RuntimeError):  # not there, or no home folder to look in
        pass
    log.info("compiling the CPU engine for this machine, once (some seconds) ...")
    began = time.perf_counter()
    content = compiled()
    log.info("compiled in %.1f s", time.perf_counter() - began)
    try:
        if path is None:
            raise OSError("there is no home folder; set TINYSTORIES_CACHE")
        keep(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        log.warning(
            "the machine code cannot be kept (%s): the next start compiles again; TINYSTORIES_CACHE names a folder",
            error,
        )
    return content


def keep(path: Path, content: bytes) -> None:
    """Write whole or not at all; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    others = sorted(path.parent.glob("forward-*.o"), key=lambda other: other.stat().st_mtime)
    for other in others[:-KEPT_FILES]:
        other.unlink(missing_ok=True)


@ctypes.CFUNCTYPE(None)
def never() -> None:
    os.abort()


def address_of(symbol: str) -> int:
    """Of a function that machine code may call: the linker would take an unknown one for 0 and say nothing."""
    if symbol.startswith(NEVER_CALLED):
        return address(never)
    if symbol.startswith("Py"):
        return address(getattr(ctypes.pythonapi, symbol))
    if sys.platform == "win32":
        places = [(ctypes.windll.kernel32, "SwitchToThread" if symbol == "sched_yield" else symbol)]  # type: ignore[attr-defined]
        places.append((ctypes.cdll.msvcrt, symbol))
    else:
        places = [(ctypes.CDLL(None), symbol)]
    for library, name in places:
        if hasattr(library, name):
            return address(getattr(library, name))
    if (library_name := ctypes.util.find_library("m")) and hasattr(ctypes.CDLL(library_name), symbol):
        return address(getattr(ctypes.CDLL(library_name), symbol))
    raise UserError(f"the CPU engine needs the function {symbol} of the C library; use --engine torch")


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def load() -> Forward:
    """The function; a call of it lets other Python threads run."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    header, _, machine_code = object_file().partition(b"\n")
    facts = json.loads(header)
    for symbol in facts["calls"]:
        if llvm.address_of_symbol(symbol) is None:  # else Numba is here, and needs its own
            llvm.add_symbol(symbol, address_of(symbol))
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double, ctypes.c_int64, ctypes.c_int64
    )
    function = prototype(engine.get_function_address(facts["name"]))
    KEPT.append(engine)
    return function
