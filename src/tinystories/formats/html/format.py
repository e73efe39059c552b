"""A storyteller in one HTML file: weights, tokenizer and a page that tells stories offline; export only."""

import dataclasses
import math
from pathlib import Path

from tinystories.config import ModelConfig
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html.check import check_stories
from tinystories.formats.html.document import write_document
from tinystories.formats.html.model_data import build_page_data, load_int8
from tinystories.formats.protocol import Format
from tinystories.generate.batching import Request, check_text
from tinystories.generate.storyteller import Storyteller
from tinystories.weights.names import expected_shapes

# What browsers can handle. Opening a page takes about three times its size in memory for a moment, and then the weights
# and the KV cache.
MAX_FILE_BYTES = 250_000_000
MAX_CACHE_BYTES = 500_000_000
CHECK_PROMPT, CHECK_TOKENS = "Once upon a time", 48


def write(model: ModelBundle, path: Path, precision: str) -> None:
    """Write the page. `UserError` if it would be too large, or the tokenizer is not BPE of a kind that pages have."""
    assert precision == "int8"
    check_text(model.title, "the title")
    check_text(model.license, "the license")
    check_size(model.config)
    write_document(path, model, *build_page_data(model))


def check_size(config: ModelConfig) -> None:
    """Raise `UserError` if a page of this model is more than a browser can handle."""
    n_bytes = 0
    for shape in expected_shapes(config).values():
        n_bytes += math.prod(shape) + 4 * shape[0] if len(shape) > 1 else 4 * shape[0]
    file_bytes, cache_bytes = n_bytes * 4 // 3, 8 * config.n_layer * config.kv_heads * config.n_ctx * config.head_dim
    if file_bytes > MAX_FILE_BYTES:
        raise UserError(
            f"a page of this model would have {file_bytes / 1e6:,.0f} MB, more than a browser can handle"
            f" ({MAX_FILE_BYTES / 1e6:,.0f} MB); use --format onnx or gguf"
        )
    if cache_bytes > MAX_CACHE_BYTES:
        raise UserError(
            f"a page of this model would need {cache_bytes / 1e6:,.0f} MB for a context of {config.n_ctx:,} tokens,"
            f" more than a browser can handle ({MAX_CACHE_BYTES / 1e6:,.0f} MB); use --format onnx or gguf"
        )


def check(model: ModelBundle, path: Path) -> str | None:
    """Run the page: a greedy story and two with the model's own settings must have the ids that the engine generates.

    Returns what was compared, or None if nothing on this machine can run a page. `UserError` if ids differ.
    """
    engine = CpuEngine(model.config, load_int8(model), EngineConfig(n_slots=1))
    greedy = dataclasses.replace(model.sampling, temperature=0.0)
    requests = [
        Request(prompt=CHECK_PROMPT, settings=settings, max_tokens=CHECK_TOKENS, seed=seed)
        for seed, settings in enumerate((greedy, model.sampling, model.sampling))
    ]
    return check_stories(path, Storyteller(engine, model.tokenizer, model.sampling), requests)


def next_steps(path: Path) -> str:
    return f"next: open {path} in a browser; it needs no network and no server"


HTML = Format(name="html", write=write, check=check, max_divergence={"int8": 0}, next_steps=next_steps)
