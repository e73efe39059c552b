"""A model as an ONNX file with a key/value cache, by the names that Optimum and transformers.js know.

Letters in shapes: B batch, T new tokens, P past ones, S = P + T, K heads of keys and values, D = head_dim, V vocab.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.interop.model_bundle import ModelBundle
from tinystories.interop.onnx_builder import DecoderBuilder, GraphBuilder

Floats = npt.NDArray[np.float32]

MAX_FILE_BYTES = 2**31 - 2**20  # bytes: Protocol Buffers end at 2 GB; the nodes take the rest
SPLIT_POINTS = 1, 5  # where `logits` splits the ids
TOLERANCE = 1e-4  # of logits with and without a past, for logits up to 10


def import_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'ONNX files need {name}: pip install "tinystories-gpt[export]"') from None


def write(model: ModelBundle, path: Path, precision: str) -> None:
    """The graph to `path`, and the tokenizer beside it, for `stories.onnx` as `stories.onnx.tokenizer.json`.

    In: `input_ids` and `position_ids` (B, T), `attention_mask` (B, S; 0: padding), int64, and of each block I
    `past_key_values.I.key` and `.value` (B, K, P, D), fp32; P may be 0. Out: `logits` (B, T, V), and
    `present.I.key` and `.value` (B, K, S, D), the past of the next call. `UserError` where one file is too small.
    """
    assert precision == "f32"
    from tinystories import __version__

    onnx = import_package("onnx")
    graph = GraphBuilder()
    DecoderBuilder(graph, model.config, model.weights).build()
    if sum(array.nbytes for array in graph.initializers.values()) > MAX_FILE_BYTES:
        raise UserError("an ONNX file ends at 2 GB, which these weights exceed; use --format hf")
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
    return "next: docs/interop.md has a program of twenty lines that writes a story with it"


def logits(path: Path, ids: list[int]) -> Floats:
    """(T, V) by ONNX Runtime, read at once. `UserError` unless reading in parts, with the past kept, gives the same."""
    onnxruntime = import_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = 1  # the ids are few
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        full_logits = run_chunks(session, [ids])
        chunked_logits = run_chunks(session, np.split(np.array(ids), SPLIT_POINTS))
    except Exception as error:  # its errors have no type in common
        raise UserError(f"{path}: ONNX Runtime cannot run it: {sanitize(error)}") from None
    max_difference = float(np.abs(full_logits - chunked_logits).max() / max(1, np.abs(full_logits).max() / 10))
    if not max_difference <= TOLERANCE:
        raise UserError(f"{path}: with and without a past its logits differ by {max_difference:.2g}")
    return full_logits


def run_chunks(session: Any, chunks: Sequence[npt.ArrayLike]) -> Floats:
    """(T, V) after each id of the parts, which are read one after the other; empty ones are left out."""
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
