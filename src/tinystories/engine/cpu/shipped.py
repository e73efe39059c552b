"""Model directories whose only weights are packed ones: a quarter of the size, for every engine."""

import json
from pathlib import Path

from tinystories import checkpoint
from tinystories.checkpoint import PACKED, ModelFiles
from tinystories.config import SamplingConfig
from tinystories.engine.cpu.weights import LAYOUT, pack, write


def ship(files: ModelFiles, folder: Path, sampling: SamplingConfig | None = None) -> None:
    """Write the model as a directory with int8 weights, its tokenizer without spaces, and its provenance.

    `sampling` takes the place of its default settings.
    """
    files.check_weights()
    facts = {"layout": str(LAYOUT), "precision": "int8", "source_sha256": files.weights_sha256}
    compact = json.dumps(files.tokenizer().parts, ensure_ascii=False, separators=(",", ":"))
    with checkpoint.whole(folder) as draft:
        write(draft / PACKED, dict(pack(files, "int8")), facts)
        (draft / "tokenizer.json").write_text(compact, encoding="utf-8", newline="\n")
        checkpoint.describe(draft, files.config, sampling or files.sampling, files.provenance, PACKED)
