"""The nodes of an ONNX graph that does what a model does.

Letters in shapes: B batch, T new tokens, P past ones, S = P + T, N = B x T rows, C = n_embd, H heads, K of them of keys
and values, G = H / K, D = head_dim, V vocab.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu.plan import EMBEDDING, HEAD, POSITIONS
from tinystories.positions import rotary_tables, sinusoid_table

OPSET, IR = 17, 8  # the first opset with LayerNormalization; ONNX Runtime has read both since 1.12
LOWEST = np.finfo(np.float32).min  # where nothing may be seen: unlike -inf it makes no NaN


class Graph:
    """Nodes in the order of their work, and the arrays they take."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def array(self, name: str, values: npt.ArrayLike, kind: type = np.float32) -> str:
        self.arrays[name] = np.asarray(values, kind, order="C")
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

    def __init__(self, graph: Graph, config: ModelConfig, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        self.graph, self.config, self.weights = graph, config, weights
        self.classic = config.architecture == "classic"
        self.group = config.n_head // config.kv_heads

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
        windows = [config.window_of(i) for i in range(config.n_layer)]
        masks = {window: self.mask(window) for window in sorted(set(windows))}
        for i, window in enumerate(windows):
            layer = f"layers.{i}."
            x = add("Add", x, self.attention(i, self.norm(x, f"{layer}input_layernorm"), masks[window]))
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
        if self.config.learned_positions:
            return self.weight(POSITIONS)
        return self.graph.array("sinusoids", sinusoid_table(self.config.n_ctx, self.config.n_embd))

    def rotation_tables(self) -> tuple[str, str]:
        """(n_ctx, D) for x * cos + (x with its halves swapped) * sin."""
        cos, sin = rotary_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_base)
        return (
            self.graph.array("cosines", np.concatenate((cos, cos), axis=1)),
            self.graph.array("sines", np.concatenate((-sin, sin), axis=1)),
        )

    def mask(self, window: int) -> str:
        """(B, 1, G x T, S) to add to scores: a token sees the last `window` ones (0: all) up to itself, no padding.

        Padding inside a text counts in the window, as in GPT-Neo of transformers.
        """
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
        return add("Where", add("And", visible, given), graph.number(0.0), graph.array("lowest", LOWEST))

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
        if config.scaled_scores:
            q = add("Mul", q, graph.number(1 / math.sqrt(D)))
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
        if self.config.activation == "relu":
            return add("Relu", x)
        if self.config.activation == "gelu_erf":
            f = add("Erf", add("Div", x, self.graph.number(math.sqrt(2))))
        else:
            cubed = add("Mul", add("Pow", x, self.graph.number(3.0)), self.graph.number(0.044715))
            f = add("Tanh", add("Mul", add("Add", x, cubed), self.graph.number(math.sqrt(2 / math.pi))))
        return add("Mul", add("Mul", x, add("Add", f, self.graph.number(1.0))), self.graph.number(0.5))
