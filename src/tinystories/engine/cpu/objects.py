"""Objects: the kernels' machine code, made ahead of time for the levels of `target`, so that nothing is compiled.

They are files of this package's folder `objects`, of which a wheel has a copy: one for each level, and `objects.json`
with their SHA-256 and the hash of the sources that they were made from. A clone has them only after `make objects`, and
once the sources change they are not used. python -m tinystories.engine.cpu.objects makes them.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tinystories.engine.cpu.compiler import ENTRY_POINTS, Request
from tinystories.engine.cpu.target import ARM_LEVELS, LEVELS, Target
from tinystories.errors import UserError
from tinystories.files import atomic_file
from tinystories.weights.quantize import BLOCK_ROWS, GROUP_SIZE, INT8_BLOCK_ROWS

log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
SOURCE_FILES = (SOURCE_FOLDER / "compiler.py", *sorted((SOURCE_FOLDER / "kernels").glob("*.py")))
OBJECT_FOLDER = SOURCE_FOLDER / "objects"
INDEX_FILE = "objects.json"
MADE_WITH = ("numpy", "numba", "llvmlite")


def hash_sources() -> str:
    """Return the SHA-256 of all that is compiled, which does not depend on the processor or on versions."""
    digest = hashlib.sha256(f"{BLOCK_ROWS} {INT8_BLOCK_ROWS} {GROUP_SIZE}".encode())  # compiled in as constants
    for path in SOURCE_FILES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_object(target: Target) -> Path | None:
    """Return the file with the objects for a target; None if there is none, or it was made from other sources.

    They are for Linux; macOS and Windows load code in another way, which has never been tried with them.
    """
    level = target.level or target.best_level
    if level not in LEVELS or sys.platform != "linux":
        return None
    entry = read_index()["objects"].get(level)
    return OBJECT_FOLDER / f"{level}.xz" if entry and entry["target"] == list(LEVELS[level][:2]) else None


@functools.cache
def read_index() -> dict[str, Any]:
    """Return the contents of objects.json; without objects if it is missing, damaged or about other sources."""
    try:
        index = json.loads((OBJECT_FOLDER / INDEX_FILE).read_text())
        if index["sources"] == hash_sources():
            if all({"sha256", "target"} == entry.keys() for entry in index["objects"].values()):
                return index
            raise ValueError("an entry is incomplete")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s is damaged and is not used; install the package again", OBJECT_FOLDER / INDEX_FILE)
    return {"objects": {}}


@functools.cache
def read_objects(path: Path) -> dict[str, bytes]:
    """Return what `compile_entry_point` made for each entry point; nothing if the SHA-256 is not the recorded one."""
    import lzma  # takes longer to import than what is loaded with it

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != read_index()["objects"][path.stem]["sha256"]:
        log.warning("%s is damaged and is not used; install the package again", path)
        return {}
    content = lzma.decompress(content)
    header, _, content = content.partition(b"\n")
    objects, start = {}, 0
    for name, size in json.loads(header).items():
        objects[name] = content[start : start + size]
        start += size
    return objects


def load_object(target: Target, entry_point: str) -> bytes | None:
    """Return the machine code of an entry point for a target, or None if it must be compiled."""
    path = find_object(target)
    try:
        return read_objects(path).get(entry_point) if path else None
    except (OSError, ImportError) as error:  # ImportError: a Python without lzma
        log.warning("%s cannot be read: %s", path, error)
        return None


def require_compiler() -> None:
    """Raise UserError unless this installation can compile: if Numba is missing, or this is not a Python process."""
    try:
        metadata.version("numba")
    except metadata.PackageNotFoundError:
        raise UserError(
            "this installation has no machine code for this processor, and Numba, which compiles it, is not installed:"
            " pip install numba, or use --engine torch"
        ) from None
    if not sys.executable or getattr(sys, "frozen", False):
        raise UserError("the CPU engine is compiled by a Python process, and this program is none; use --engine torch")


def compile_in_process(request: Request, variables: dict[str, str] | None = None) -> bytes:
    """Run `compiler.compile_entry_point` in a process of its own, with some environment variables.

    Raises UserError if the process fails; see also `require_compiler`.
    """
    require_compiler()
    environment = os.environ | (variables or {})
    environment |= {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # -P: not from the current folder.
    command = [sys.executable, "-P", "-m", "tinystories.engine.cpu.compiler", json.dumps(request._asdict())]
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode:
        problem = (result.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"compiling the CPU engine failed ({problem}); use --engine torch")
    return result.stdout


def compile_level(level: str) -> bytes:
    """Compile all entry points for a level of Linux; return the contents of its file."""
    import lzma

    triple = f"{'aarch64' if level in ARM_LEVELS else 'x86_64'}-unknown-linux-gnu"
    processor, features, _ = LEVELS[level]
    objects = {name: compile_in_process(Request(name, triple, processor, features)) for name in ENTRY_POINTS}
    header = json.dumps({name: len(content) for name, content in objects.items()}).encode()
    # Uncompressed, the precisions have much in common; one stream for all takes half the space.
    return lzma.compress(header + b"\n" + b"".join(objects.values()), preset=9)


def make_objects(levels: Sequence[str], folder: Path = OBJECT_FOLDER) -> None:
    """Make the objects of some levels, and an index of just these, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for level, content in zip(levels, pool.map(compile_level, levels), strict=True):
            path, digest = folder / f"{level}.xz", hashlib.sha256(content).hexdigest()
            with atomic_file(path) as file:
                file.write(content)
            entries[level] = {"sha256": digest, "target": LEVELS[level][:2]}
            log.info("%s: %.0f kB, SHA-256 %s", path, len(content) / 1e3, digest)
    index = {"sources": hash_sources(), "made_with": read_versions(), "objects": entries}
    with atomic_file(folder / INDEX_FILE) as file:
        file.write(json.dumps(index, indent=1).encode() + b"\n")


def read_versions() -> dict[str, str]:
    """Return the versions of all that the bytes of an object depend on, beside the sources."""
    return {name: metadata.version(name) for name in MADE_WITH} | {"python": platform.python_version()}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_objects(sys.argv[1:] or list(LEVELS))


if __name__ == "__main__":
    main()
