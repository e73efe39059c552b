"""A model as an ONNX file with a key/value cache, by the names that Optimum and transformers.js know.

Letters in shapes: B batch, T new tokens, P past ones, S = P + T, K heads of keys and values, D = head_dim, V vocab.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.data.tokenizer import one_line
from tinystories.errors import UserError
from tinystories.interop.onnx_nodes import Decoder, Graph
from tinystories.interop.portable import Portable

Floats = npt.NDArray[np.float32]

LARGEST_FILE = 2**31 - 2**20  # bytes: Protocol Buffers end at 2 GB; the nodes take the rest
CHUNKS = 1, 5  # where `logits` splits the ids
AGREEMENT = 1e-4  # of logits with and without a past, for logits up to 10


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'ONNX files need {name}: pip install "tinystories-gpt[export]"') from None


def write(model: Portable, path: Path, precision: str) -> None:
    """The graph to `path`, and the tokenizer beside it, for `stories.onnx` as `stories.onnx.tokenizer.json`.

    In: `input_ids` and `position_ids` (B, T), `attention_mask` (B, S; 0: padding), int64, and of each block I
    `past_key_values.I.key` and `.value` (B, K, P, D), fp32; P may be 0. Out: `logits` (B, T, V), and
    `present.I.key` and `.value` (B, K, S, D), the past of the next call. `UserError` where one file is too small.
    """
    assert precision == "f32"
    from tinystories import __version__

    onnx = package("onnx")
    graph = Graph()
    Decoder(graph, model.config, model.weights).build()
    if sum(array.nbytes for array in graph.arrays.values()) > LARGEST_FILE:
        raise UserError("an ONNX file ends at 2 GB, which these weights exceed; use --format hf")
    proto = graph.proto(onnx, model.config)
    proto.producer_name, proto.producer_version, proto.model_version = "tinystories-gpt", __version__, 1
    facts = {"architecture": model.config.architecture, "end_id": model.tokenizer.end_id, "n_ctx": model.config.n_ctx}
    onnx.helper.set_model_props(proto, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    model.tokenizer.save(companions(path)[0])


def companions(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.tokenizer.json")]


def hint(_: Path) -> str:
    return "next: docs/interop.md has a program of twenty lines that writes a story with it"


def logits(path: Path, ids: list[int]) -> Floats:
    """(T, V) by ONNX Runtime, read at once. `UserError` unless reading in parts, with the past kept, gives the same."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = 1  # the ids are few
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        whole = run(session, [ids])
        parts = run(session, np.split(np.array(ids), CHUNKS))
    except Exception as error:  # its errors have no type in common
        raise UserError(f"{path}: ONNX Runtime cannot run it: {one_line(error)}") from None
    largest = float(np.abs(whole - parts).max() / max(1, np.abs(whole).max() / 10))
    if not largest <= AGREEMENT:
        raise UserError(f"{path}: with and without a past its logits differ by {largest:.2g}")
    return whole


def run(session: Any, parts: Sequence[npt.ArrayLike]) -> Floats:
    """(T, V) after each id of the parts, which are read one after the other; empty ones are left out."""
    past = {
        given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()
        if given.name.startswith("past_key_values.")
    }
    done, rows = 0, []
    for part in parts:
        ids = np.array(part, np.int64)[None]
        if not ids.size:
            continue
        total = done + ids.shape[1]
        feeds = {"input_ids": ids, "position_ids": np.arange(done, total)[None]}
        feeds["attention_mask"] = np.ones((1, total), np.int64)
        logits, *present = session.run(None, feeds | past)
        past, done = dict(zip(past, present, strict=True)), total
        rows.append(logits[0])
    return np.concatenate(rows)
