"""Model directories with int8 weights only: a quarter of the size, readable by every engine."""

import json
from pathlib import Path

from tinystories import checkpoint
from tinystories.checkpoint import INT8_WEIGHTS, ModelFiles
from tinystories.config import SamplingConfig
from tinystories.engine.cpu.weights import FORMAT_VERSION, quantize, write_safetensors
from tinystories.files import atomic_directory


def write_int8_model(files: ModelFiles, folder: Path, sampling: SamplingConfig | None = None) -> None:
    """Write a model directory with int8 weights, tokenizer.json without whitespace, and config.json with provenance.

    `sampling` replaces the model's default sampling settings. Raises UserError if the weights do not match their
    checksum.
    """
    files.check_weights()
    metadata = {"layout": str(FORMAT_VERSION), "precision": "int8", "source_sha256": files.weights_sha256}
    tokenizer_json = json.dumps(files.tokenizer().json_data, ensure_ascii=False, separators=(",", ":"))
    with atomic_directory(folder) as draft:
        write_safetensors(draft / INT8_WEIGHTS, dict(quantize(files, "int8")), metadata)
        (draft / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8", newline="\n")
        checkpoint.write_config(draft, files.config, sampling or files.sampling, files.provenance, INT8_WEIGHTS)
