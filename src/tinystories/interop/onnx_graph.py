"""A model as an ONNX graph with a key/value cache, by the names that Optimum and transformers.js know.

Letters in shapes: B batch, T new tokens, P past ones, S = P + T, N = B x T rows, C = n_embd, H heads, K of them of keys
and values, G = H / K, D = head_dim, V vocab.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.data.tokenizer import one_line
from tinystories.engine.cpu.plan import EMBEDDING, HEAD
from tinystories.errors import UserError
from tinystories.interop.portable import Portable
from tinystories.positions import rotary_tables, sinusoid_table

Floats = npt.NDArray[np.float32]

HINT = "next: docs/interop.md has a program of twenty lines that writes a story with it"
OPSET, IR = 17, 8  # the first opset with LayerNormalization; onnxruntime has read both since 1.12
LARGEST_FILE = 2**31 - 2**20  # bytes: Protocol Buffers end at 2 GB; the nodes take the rest
CHUNKS = 1, 5  # where `logits` splits the ids
AGREEMENT = 1e-4  # of logits with and without a past, for logits up to 10
LOWEST = np.float32(np.finfo(np.float32).min)  # where nothing may be seen: unlike -inf it makes no NaN


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'ONNX files need {name}: pip install "tinystories-gpt[export]"') from None


def write(model: Portable, path: Path, precision: str) -> None:
    """The graph to `path`, and the tokenizer beside it, for `stories.onnx` as `stories.tokenizer.json`.

    In: `input_ids` and `position_ids` (B, T), `attention_mask` (B, S; 0: padding, on any side), int64, and of each
    block I `past_key_values.I.key` and `.value` (B, K, P, D), fp32; P may be 0. Out: `logits` (B, T, V), and
    `present.I.key` and `.value` (B, K, S, D), the past of the next call. `UserError` where one file is too small.
    """
    assert precision == "f32"
    from tinystories import __version__

    onnx = package("onnx")
    graph = Graph()
    Decoder(graph, model).build()
    if sum(array.nbytes for array in graph.arrays.values()) > LARGEST_FILE:
        raise UserError("an ONNX file ends at 2 GB, which these weights exceed; use --format hf")
    proto = graph.proto(onnx, model.config)
    proto.producer_name, proto.producer_version, proto.model_version = "tinystories-gpt", __version__, 1
    facts = {"architecture": model.config.architecture, "end_id": model.tokenizer.end_id, "n_ctx": model.config.n_ctx}
    onnx.helper.set_model_props(proto, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    model.tokenizer.save(path.with_name(f"{path.stem}.tokenizer.json"))


def logits(path: Path, ids: list[int]) -> Floats:
    """(T, V) by ONNX Runtime, read at once. `UserError` unless reading in parts, with the past kept, gives the same."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        whole = read(session, [ids])
        parts = read(session, np.split(np.array(ids), CHUNKS))
    except Exception as error:  # its errors have no type in common
        raise UserError(f"{path}: ONNX Runtime cannot run it: {one_line(error)}") from None
    largest = float(np.abs(whole - parts).max() / max(1, np.abs(whole).max() / 10))
    if not largest <= AGREEMENT:
        raise UserError(f"{path}: with and without a past its logits differ by {largest:.2g}")
    return whole


def read(session: Any, parts: Sequence[npt.ArrayLike]) -> Floats:
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


class Graph:
    """Nodes in the order of their work, and the arrays they take."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def array(self, name: str, values: npt.ArrayLike, kind: type = np.float32) -> str:
        self.arrays[name] = np.ascontiguousarray(values, kind).reshape(np.shape(values))
        return name

    def integers(self, *values: int) -> str:
        return self.array("integers." + ".".join(map(str, values)), values, np.int64)

    def number(self, value: float) -> str:
        """fp32, or int64 where it is an integer."""
        return self.array(f"number.{value!r}", value, np.int64 if isinstance(value, int) else np.float32)

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        name = name or f"{kind}.{len(self.nodes)}"
        self.nodes.append((kind, inputs, [name], attributes))
        return name

    def halves(self, x: str) -> list[str]:
        """Of the last axis."""
        names = [f"Half.{len(self.nodes)}.{i}" for i in (0, 1)]
        self.nodes.append(("Split", (x,), names, {"axis": -1}))
        return names

    def proto(self, onnx: Any, config: ModelConfig) -> Any:
        helper, kinds = onnx.helper, onnx.TensorProto
        nodes = [
            helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes)
            for kind, inputs, outputs, attributes in self.nodes
        ]
        batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
        given = [
            helper.make_tensor_value_info(name, kinds.INT64, (batch, length))
            for name, length in (("input_ids", new), ("attention_mask", total), ("position_ids", new))
        ]
        told = [helper.make_tensor_value_info("logits", kinds.FLOAT, (batch, new, config.vocab_size))]
        for i in range(config.n_layer):
            for part in ("key", "value"):
                for where, prefix, length in ((given, "past_key_values", past), (told, "present", total)):
                    shape = batch, config.kv_heads, length, config.head_dim
                    where.append(helper.make_tensor_value_info(f"{prefix}.{i}.{part}", kinds.FLOAT, shape))
        arrays = [onnx.numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        graph = helper.make_graph(nodes, "tinystories", given, told, arrays)
        return helper.make_model(graph, ir_version=IR, opset_imports=[helper.make_opsetid("", OPSET)])


class Decoder:
    """Fills a graph with a model. Its stream is (N, C): so Gemm serves, which takes the matrices as they are stored."""

    def __init__(self, graph: Graph, model: Portable) -> None:
        self.graph, self.config, self.weights = graph, model.config, model.weights
        self.classic = model.config.architecture == "classic"
        self.group = model.config.n_head // model.config.kv_heads
        self.scaled: bool = getattr(model.config, "scaled_scores", True)
        self.activation: str = getattr(model.config, "activation", "relu")
        self.window: int = getattr(model.config, "window", 0)

    def build(self) -> None:
        graph, config, add = self.graph, self.config, self.graph.add
        self.shape = add("Shape", "input_ids")
        self.heads = {n: self.per_token(n, config.head_dim) for n in (config.n_head, config.kv_heads)}
        x = add("Gather", self.weight(EMBEDDING), "input_ids")
        if self.classic:
            x = add("Add", x, add("Gather", self.position_table(), "position_ids"))
        else:
            self.rotation = [
                add("Unsqueeze", add("Gather", table, "position_ids"), graph.integers(2))
                for table in self.rotation_tables()
            ]
        x = add("Reshape", x, graph.integers(-1, config.n_embd))
        masks = {window: self.mask(window) for window in sorted({0, self.window})}
        for i in range(config.n_layer):
            layer = f"layers.{i}."
            x = add("Add", x, self.attention(i, self.norm(x, f"{layer}input_layernorm"), masks[self.window * (i % 2)]))
            x = add("Add", x, self.mlp(f"{layer}mlp.", self.norm(x, f"{layer}post_attention_layernorm")))
        head = self.weight(EMBEDDING if config.tied else HEAD)
        rows = add("Gemm", self.norm(x, "norm"), head, transB=1)
        add("Reshape", rows, self.per_token(config.vocab_size), name="logits")

    def per_token(self, *sizes: int) -> str:
        """The shape (B, T, *sizes)."""
        return self.graph.add("Concat", self.shape, self.graph.integers(*sizes), axis=0)

    def weight(self, name: str) -> str:
        return self.graph.array(name, self.weights[name])

    def position_table(self) -> str:
        if "embed_positions.weight" in self.weights:
            return self.weight("embed_positions.weight")
        return self.graph.array("sinusoids", sinusoid_table(self.config.n_ctx, self.config.n_embd))

    def rotation_tables(self) -> tuple[str, str]:
        """(n_ctx, D) for x * cos + (x with its halves swapped) * sin."""
        cos, sin = rotary_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_base)
        return (
            self.graph.array("cosines", np.concatenate((cos, cos), axis=1)),
            self.graph.array("sines", np.concatenate((-sin, sin), axis=1)),
        )

    def mask(self, window: int) -> str:
        """(B, 1, G x T, S), to be added to scores: a token sees the last `window` ones (0: all) to itself, no padding."""
        graph, add = self.graph, self.graph.add
        past = add("Squeeze", add("Shape", "past_key_values.0.key", start=2, end=3))
        total = add("Add", past, add("Squeeze", add("Shape", "input_ids", start=1)))
        zero, one = graph.number(0), graph.number(1)
        own = add("Tile", add("Range", past, total, one), graph.integers(self.group))
        own = add("Unsqueeze", own, graph.integers(1))
        seen = add("Range", zero, total, one)
        visible = add("LessOrEqual", seen, own)
        if window:
            visible = add("And", visible, add("Greater", seen, add("Sub", own, graph.number(window))))
        given = add("Unsqueeze", add("Greater", "attention_mask", zero), graph.integers(1, 2))
        return add("Where", add("And", visible, given), self.graph.number(0.0), graph.array("lowest", LOWEST))

    def norm(self, x: str, name: str) -> str:
        """Of the last axis: LayerNorm, or RMSNorm in the steps that ONNX Runtime knows to be one."""
        add, weight = self.graph.add, self.weight(f"{name}.weight")
        if self.classic:
            bias = self.weight(f"{name}.bias")
            return add("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.config.norm_eps)
        square = add("ReduceMean", add("Pow", x, self.graph.number(2.0)), axes=[-1], keepdims=1)
        size = add("Sqrt", add("Add", square, self.graph.number(self.config.norm_eps)))
        return add("Mul", add("Div", x, size), weight)

    def linear(self, x: str, name: str) -> str:
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        return self.graph.add("Gemm", x, self.weight(f"{name}.weight"), *bias, transB=1)

    def attention(self, i: int, x: str, mask: str) -> str:
        graph, config, add = self.graph, self.config, self.graph.add
        D, H, K = config.head_dim, config.n_head, config.kv_heads
        name = f"layers.{i}.self_attn."
        q = self.by_head(x, f"{name}q", H)
        if self.scaled:
            q = add("Mul", q, self.graph.number(1 / math.sqrt(D)))
        key, value = (
            add("Concat", f"past_key_values.{i}.{part}", self.by_head(x, f"{name}{part[0]}", K), axis=2, name=to)
            for part, to in (("key", f"present.{i}.key"), ("value", f"present.{i}.value"))
        )
        if self.group > 1:  # heads of a group stand below each other: (B, K, G x T, D)
            q = add("Reshape", q, graph.integers(0, K, -1, D))
        scores = add("Add", add("MatMul", q, add("Transpose", key, perm=[0, 1, 3, 2])), mask)
        y = add("MatMul", add("Softmax", scores, axis=-1), value)
        if self.group > 1:
            y = add("Reshape", y, graph.integers(0, H, -1, D))
        y = add("Reshape", add("Transpose", y, perm=[0, 2, 1, 3]), graph.integers(-1, H * D))
        return self.linear(y, f"{name}o_proj")

    def by_head(self, x: str, name: str, n_head: int) -> str:
        """Queries, keys or values: (B, heads, T, D)."""
        add = self.graph.add
        y = add("Reshape", self.linear(x, f"{name}_proj"), self.heads[n_head])
        if not name.endswith("v"):
            if f"{name}_norm.weight" in self.weights:
                y = self.norm(y, f"{name}_norm")
            if not self.classic:
                y = self.rotated(y)
        return add("Transpose", y, perm=[0, 2, 1, 3])

    def rotated(self, x: str) -> str:
        graph, add = self.graph, self.graph.add
        first, second = graph.halves(x)
        swapped = add("Concat", second, first, axis=-1)
        cos, sin = self.rotation
        return add("Add", add("Mul", x, cos), add("Mul", swapped, sin))

    def mlp(self, name: str, x: str) -> str:
        add = self.graph.add
        inner = self.linear(x, f"{name}up_proj")
        if self.classic:
            inner = self.activated(inner)
        else:
            gate = self.linear(x, f"{name}gate_proj")
            inner = add("Mul", add("Mul", gate, add("Sigmoid", gate)), inner)
        return self.linear(inner, f"{name}down_proj")

    def activated(self, x: str) -> str:
        """ReLU; or GELU, x (1 + f) / 2, where f is erf(x / sqrt 2) or near it by tanh (arXiv 1606.08415)."""
        add = self.graph.add
        if self.activation == "relu":
            return add("Relu", x)
        if self.activation == "gelu_erf":
            f = add("Erf", add("Div", x, self.graph.number(math.sqrt(2))))
        else:
            cubed = add("Mul", add("Pow", x, self.graph.number(3.0)), self.graph.number(0.044715))
            f = add("Tanh", add("Mul", add("Add", x, cubed), self.graph.number(math.sqrt(2 / math.pi))))
        return add("Mul", add("Mul", x, add("Add", f, self.graph.number(1.0))), self.graph.number(0.5))
