"""ONNX export with a KV cache; inputs and outputs are named as Optimum and transformers.js expect.

Dimensions: B batch, T new tokens, P past tokens, S = P + T, K KV heads, D head_dim, V vocab_size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.onnx.builder import DecoderBuilder, GraphBuilder
from tinystories.formats.protocol import FP32_TOLERANCE, Format, import_package, max_logit_difference

Floats = npt.NDArray[np.float32]

# Most bytes of weights: Protocol Buffers are limited to 2 GB, and 1 MB is left for the nodes.
MAX_FILE_BYTES = 2**31 - 2**20
SPLIT_POINTS = 1, 5  # where `logits` splits the ids into chunks to test the KV cache


def write(model: ModelBundle, path: Path, precision: str) -> None:
    """Write the graph to `path`, e.g. stories.onnx, and the tokenizer beside it, stories.onnx.tokenizer.json.

    Inputs: `input_ids` and `position_ids` (B, T) and `attention_mask` (B, S; 0 is padding), int64; for each layer I
    `past_key_values.I.key` and `.value` (B, K, P, D), fp32, where P may be 0. Outputs: `logits` (B, T, V), and
    `present.I.key` and `.value` (B, K, S, D), the next call's past. `UserError` if the weights exceed 2 GB.
    """
    assert precision == "f32"
    from tinystories import __version__

    onnx = import_package("onnx", "ONNX export")
    graph = GraphBuilder()
    DecoderBuilder(graph, model.config, model.weights).build()
    if sum(array.nbytes for array in graph.initializers.values()) > MAX_FILE_BYTES:
        raise UserError("these weights exceed 2 GB, the limit of an ONNX file; use --format hf")
    proto = graph.to_proto(onnx, model.config)
    proto.producer_name, proto.producer_version, proto.model_version = "tinystories-gpt", __version__, 1
    metadata = {
        "architecture": model.config.architecture,
        "end_id": model.tokenizer.end_id,
        "n_ctx": model.config.n_ctx,
    }
    onnx.helper.set_model_props(proto, {name: str(value) for name, value in metadata.items()})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    model.tokenizer.save(sidecars(path)[0])


def sidecars(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.tokenizer.json")]


def next_steps(_: Path) -> str:
    return "next: docs/interop.md has a 20-line program that generates a story with it"


def logits(path: Path, ids: list[int]) -> Floats:
    """Return (T, V) logits from ONNX Runtime, in one call.

    `UserError` if ONNX Runtime cannot run the file, or if chunked evaluation with the KV cache gives other logits.
    """
    onnxruntime = import_package("onnxruntime", "ONNX export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # a short sequence; more threads do not pay off
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        full_logits = run_chunks(session, [ids])
        chunked_logits = run_chunks(session, np.split(np.array(ids), SPLIT_POINTS))
    except Exception as error:  # its exceptions have no common base class
        raise UserError(f"{path}: ONNX Runtime cannot run it: {sanitize(error)}") from None
    max_difference = max_logit_difference(chunked_logits, full_logits)
    if not max_difference <= FP32_TOLERANCE:
        raise UserError(
            f"verification failed: {path}: logits with and without the KV cache differ by {max_difference:.2g}"
        )
    return full_logits


def run_chunks(session: Any, chunks: Sequence[npt.ArrayLike]) -> Floats:
    """Run chunks of ids in order with the KV cache and return (T, V) logits; empty chunks are skipped."""
    past = {
        model_input.name: np.zeros((1, model_input.shape[1], 0, model_input.shape[3]), np.float32)
        for model_input in session.get_inputs()
        if model_input.name.startswith("past_key_values.")
    }
    n_past, rows = 0, []
    for chunk in chunks:
        ids = np.array(chunk, np.int64)[None]
        if not ids.size:
            continue
        n_total = n_past + ids.shape[1]
        feeds = {"input_ids": ids, "position_ids": np.arange(n_past, n_total)[None]}
        feeds["attention_mask"] = np.ones((1, n_total), np.int64)
        logits, *present = session.run(None, feeds | past)
        past, n_past = dict(zip(past, present, strict=True)), n_total
        rows.append(logits[0])
    return np.concatenate(rows)


ONNX = Format(
    name="onnx", write=write, logits=logits, max_divergence={"f32": 0}, sidecars=sidecars, next_steps=next_steps
)
