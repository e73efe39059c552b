"""Published weights: a registry of repositories, commits and hashes (published.json), and verified downloads."""

import json
import shutil
from pathlib import Path
from typing import Any

from tinystories import checkpoint
from tinystories.errors import UserError
from tinystories.files import atomic_directory, sha256, write_errors
from tinystories.hub import client as hub

REGISTRY_PATH = Path(__file__).with_suffix(".json")


def read_registry(path: Path = REGISTRY_PATH) -> dict[str, dict[str, Any]]:
    """Return name -> {"text", "repository" (OWNER/NAME), "revision" (a commit), "sha256" (of config.json)}."""
    registry: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return registry


def fetch(name: str, out: Path, registry: dict[str, dict[str, Any]]) -> None:
    """Download published weights and write them atomically as the model directory `out`.

    The registry has the hash of config.json, which has the hashes of all other files; all are verified. `UserError` if
    the name is unknown, a hash is wrong, or `hub.download` fails.
    """
    if name not in registry:
        available = (
            f"available: {', '.join(registry)}"
            if registry
            else "nothing has been published yet; hf:OWNER/NAME always works"
        )
        raise UserError(f"no published weights are called {name}; {available}")
    entry = registry[name]
    folder = hub.download(f"hf:{entry['repository']}@{entry['revision']}")
    if sha256(folder / "config.json") != entry["sha256"]:
        raise UserError(f"{entry['repository']}: config.json does not match the published hash; nothing was written")
    files = checkpoint.read_model(folder)
    with write_errors(out), atomic_directory(out) as staging_dir:
        for file in ("config.json", *files.checksums):
            shutil.copyfile(folder / file, staging_dir / file)
