"""Write the checksums of damaged files into the files that list them, so that the damage reaches the parsers."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path


def seal(folder: Path) -> None:
    """Update all checksums below a folder as far as the files allow it."""
    for path in sorted(folder.rglob("packed-*.safetensors")):
        attempt(seal_quantized, path)
    for path in sorted(folder.rglob("clock.json")):
        attempt(seal_clock, path)
    for path in sorted(folder.rglob("config.json")):
        attempt(seal_model, path)


def attempt(function: Callable[[Path], None], path: Path) -> None:
    if not path.is_file():
        return
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        function(path)


def file_sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError("a pipe or a device")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal_model(path: Path) -> None:
    """Update the SHA-256 of the other files in a model's config.json; the rest of its text stays as it is."""
    text = path.read_text(encoding="utf-8")
    for name, old in json.loads(text)["files"].items():
        file = path.with_name(name)
        if file.is_file():
            text = text.replace(f'"{old}"', f'"{file_sha256(file)}"')
    path.write_text(text, encoding="utf-8")


def seal_clock(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    old = json.loads(text)["optimizer_sha256"]
    path.write_text(text.replace(old, file_sha256(path.with_name("optimizer.safetensors"))), encoding="utf-8")


def seal_quantized(path: Path) -> None:
    """Update the digest in the metadata of a quantized file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    hashed = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps([header, hashed], sort_keys=True).encode())
    digest.update(data[8 + size :])
    text = data[8 : 8 + size].replace(metadata["sha256"].encode(), digest.hexdigest().encode())
    path.write_bytes(data[:8] + text + data[8 + size :])
