"""Build the ONNX graph of a model from weights and plain operators, without tracing.

Dimensions in comments: B batch, T new tokens, P past tokens, S = P + T, N = B x T rows, C n_embd, H heads, K KV heads,
G = H / K, D head_dim, V vocab_size.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.position_tables import build_rope_tables, build_sinusoid_table
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING

OPSET, IR_VERSION = 17, 8  # the first opset with LayerNormalization; ONNX Runtime has read both since 1.12
# Mask value. Unlike -inf it gives no NaN in the softmax of a row that is masked completely (padding).
MIN_FLOAT32 = np.finfo(np.float32).min


class GraphBuilder:
    """Collects nodes in topological order, and constants (initializers). Values are referred to by name."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
        self.initializers: dict[str, npt.NDArray[Any]] = {}

    def add_initializer(self, name: str, values: npt.ArrayLike, dtype: type = np.float32) -> str:
        """Add a constant and return its name."""
        self.initializers[name] = np.asarray(values, dtype, order="C")
        return name

    def add_integers(self, *values: int) -> str:
        """Add a constant int64 vector, such as a shape or a list of axes, and return its name."""
        return self.add_initializer("integers." + ".".join(map(str, values)), values, np.int64)

    def add_scalar(self, value: float) -> str:
        """Add a constant scalar, int64 for an int and fp32 for a float, and return its name."""
        return self.add_initializer(f"number.{value!r}", value, np.int64 if isinstance(value, int) else np.float32)

    def add_node(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the name of that output."""
        name = name or f"{op_type}.{len(self.nodes)}"
        self.nodes.append((op_type, inputs, [name], attributes))
        return name

    def split_halves(self, x: str) -> list[str]:
        """Split x into two halves along the last axis."""
        names = [f"Half.{len(self.nodes)}.{i}" for i in (0, 1)]
        self.nodes.append(("Split", (x,), names, {"axis": -1}))
        return names

    def to_proto(self, onnx: Any, config: ModelConfig) -> Any:
        """Return the onnx.ModelProto, with inputs and outputs named as Optimum does. `onnx`: the module."""
        helper, tensor_types = onnx.helper, onnx.TensorProto
        nodes = [
            helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes)
            for op_type, inputs, outputs, attributes in self.nodes
        ]
        batch, new, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
        graph_inputs = [
            helper.make_tensor_value_info(name, tensor_types.INT64, (batch, length))
            for name, length in (("input_ids", new), ("attention_mask", total), ("position_ids", new))
        ]
        graph_outputs = [helper.make_tensor_value_info("logits", tensor_types.FLOAT, (batch, new, config.vocab_size))]
        for i in range(config.n_layer):
            for part in ("key", "value"):
                for value_infos, prefix, length in (
                    (graph_inputs, "past_key_values", past),
                    (graph_outputs, "present", total),
                ):
                    shape = batch, config.kv_heads, length, config.head_dim
                    value_infos.append(helper.make_tensor_value_info(f"{prefix}.{i}.{part}", tensor_types.FLOAT, shape))
        initializers = [onnx.numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = helper.make_graph(nodes, "tinystories", graph_inputs, graph_outputs, initializers)
        return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])


class DecoderBuilder:
    """Adds the nodes and weights of a model to a graph.

    Activations are (N, C), so that linear layers are Gemm nodes, which take the (out, in) matrices as stored.
    """

    def __init__(self, graph: GraphBuilder, config: ModelConfig, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        self.graph, self.config, self.weights = graph, config, weights
        self.is_classic = config.architecture == "classic"
        self.group_size = config.n_head // config.kv_heads

    def build(self) -> None:
        """Add the whole model, from `input_ids` to `logits`."""
        graph, config, add = self.graph, self.config, self.graph.add_node
        self.input_shape = add("Shape", "input_ids")
        self.head_shapes = {n: self.token_shape(n, config.head_dim) for n in (config.n_head, config.kv_heads)}
        x = add("Gather", self.weight(EMBEDDING), "input_ids")
        if self.is_classic:
            x = add("Add", x, add("Gather", self.position_table(), "position_ids"))
        else:
            self.rope_nodes = [
                add("Unsqueeze", add("Gather", table, "position_ids"), graph.add_integers(2))
                for table in self.rope_tables()
            ]
        x = add("Reshape", x, graph.add_integers(-1, config.n_embd))
        windows = [config.layer_window(i) for i in range(config.n_layer)]
        masks = {window: self.causal_mask(window) for window in sorted(set(windows))}
        for i, window in enumerate(windows):
            layer = f"layers.{i}."
            x = add("Add", x, self.attention(i, self.norm(x, f"{layer}input_layernorm"), masks[window]))
            x = add("Add", x, self.mlp(f"{layer}mlp.", self.norm(x, f"{layer}post_attention_layernorm")))
        head = self.weight(EMBEDDING if config.tied else LM_HEAD)
        rows = add("Gemm", self.norm(x, "norm"), head, transB=1)
        add("Reshape", rows, self.token_shape(config.vocab_size), name="logits")

    def token_shape(self, *sizes: int) -> str:
        """Return the shape (B, T, *sizes), computed at run time."""
        return self.graph.add_node("Concat", self.input_shape, self.graph.add_integers(*sizes), axis=0)

    def weight(self, name: str) -> str:
        """Add one of the model's weights as a constant."""
        return self.graph.add_initializer(name, self.weights[name])

    def position_table(self) -> str:
        """Add the (n_ctx, C) table of learned or sinusoidal positions."""
        if self.config.learned_positions:
            return self.weight(POSITION_EMBEDDING)
        return self.graph.add_initializer("sinusoids", build_sinusoid_table(self.config.n_ctx, self.config.n_embd))

    def rope_tables(self) -> tuple[str, str]:
        """Add the (n_ctx, D) tables for x * cos + swap_halves(x) * sin; the sign of rotate_half is in the sines."""
        cos, sin = build_rope_tables(self.config.n_ctx, self.config.head_dim, self.config.rope_base)
        return (
            self.graph.add_initializer("cosines", np.concatenate((cos, cos), axis=1)),
            self.graph.add_initializer("sines", np.concatenate((-sin, sin), axis=1)),
        )

    def causal_mask(self, window: int) -> str:
        """Return the additive mask (B, 1, G x T, S): 0 where a query may attend to a key, else MIN_FLOAT32.

        A token attends to itself and the tokens before it, at most `window` in all (0: no limit), except padding.
        Padding inside a text counts towards the window, as in transformers' GPT-Neo.
        """
        graph, add = self.graph, self.graph.add_node
        past = add("Squeeze", add("Shape", "past_key_values.0.key", start=2, end=3))
        total = add("Add", past, add("Squeeze", add("Shape", "input_ids", start=1)))
        zero, one = graph.add_scalar(0), graph.add_scalar(1)
        query_positions = add("Tile", add("Range", past, total, one), graph.add_integers(self.group_size))
        query_positions = add("Unsqueeze", query_positions, graph.add_integers(1))
        key_positions = add("Range", zero, total, one)
        visible = add("LessOrEqual", key_positions, query_positions)
        if window:
            visible = add(
                "And", visible, add("Greater", key_positions, add("Sub", query_positions, graph.add_scalar(window)))
            )
        not_padding = add("Unsqueeze", add("Greater", "attention_mask", zero), graph.add_integers(1, 2))
        return add(
            "Where",
            add("And", visible, not_padding),
            graph.add_scalar(0.0),
            graph.add_initializer("lowest", MIN_FLOAT32),
        )

    def norm(self, x: str, name: str) -> str:
        """Normalize the last axis: LayerNorm, or RMSNorm written as the pattern that ONNX Runtime fuses."""
        add, weight = self.graph.add_node, self.weight(f"{name}.weight")
        if self.is_classic:
            bias = self.weight(f"{name}.bias")
            return add("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.config.norm_eps)
        mean_square = add("ReduceMean", add("Pow", x, self.graph.add_scalar(2.0)), axes=[-1], keepdims=1)
        rms = add("Sqrt", add("Add", mean_square, self.graph.add_scalar(self.config.norm_eps)))
        return add("Mul", add("Div", x, rms), weight)

    def linear(self, x: str, name: str) -> str:
        """(N, in) -> (N, out)."""
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        return self.graph.add_node("Gemm", x, self.weight(f"{name}.weight"), *bias, transB=1)

    def attention(self, i: int, x: str, mask: str) -> str:
        """Self-attention of layer i, (N, C) -> (N, C); appends to the KV cache, `past_key_values.i` -> `present.i`."""
        graph, config, add = self.graph, self.config, self.graph.add_node
        D, H, K = config.head_dim, config.n_head, config.kv_heads
        name = f"layers.{i}.self_attn."
        q = self.project_heads(x, f"{name}q", H)
        if config.scaled_scores:
            q = add("Mul", q, graph.add_scalar(1 / math.sqrt(D)))
        key, value = (
            add("Concat", f"past_key_values.{i}.{part}", self.project_heads(x, f"{name}{part[0]}", K), axis=2, name=to)
            for part, to in (("key", f"present.{i}.key"), ("value", f"present.{i}.value"))
        )
        if self.group_size > 1:  # GQA: stack the query heads of a group along T, (B, K, G x T, D)
            q = add("Reshape", q, graph.add_integers(0, K, -1, D))
        scores = add("Add", add("MatMul", q, add("Transpose", key, perm=[0, 1, 3, 2])), mask)
        y = add("MatMul", add("Softmax", scores, axis=-1), value)
        if self.group_size > 1:
            y = add("Reshape", y, graph.add_integers(0, H, -1, D))
        y = add("Reshape", add("Transpose", y, perm=[0, 2, 1, 3]), graph.add_integers(-1, H * D))
        return self.linear(y, f"{name}o_proj")

    def project_heads(self, x: str, name: str, n_head: int) -> str:
        """Project x (N, C) to queries, keys or values (B, n_head, T, D), with QK-norm and RoPE where they apply."""
        add = self.graph.add_node
        y = add("Reshape", self.linear(x, f"{name}_proj"), self.head_shapes[n_head])
        if not name.endswith("v"):
            if f"{name}_norm.weight" in self.weights:
                y = self.norm(y, f"{name}_norm")
            if not self.is_classic:
                y = self.apply_rope(y)
        return add("Transpose", y, perm=[0, 2, 1, 3])

    def apply_rope(self, x: str) -> str:
        """Rotate x (B, T, heads, D)."""
        graph, add = self.graph, self.graph.add_node
        first, second = graph.split_halves(x)
        swapped = add("Concat", second, first, axis=-1)
        cos, sin = self.rope_nodes
        return add("Add", add("Mul", x, cos), add("Mul", swapped, sin))

    def mlp(self, name: str, x: str) -> str:
        """Feed-forward layer, (N, C) -> (N, C); `modern` is SwiGLU."""
        add = self.graph.add_node
        hidden = self.linear(x, f"{name}up_proj")
        if self.is_classic:
            hidden = self.apply_activation(hidden)
        else:
            gate = self.linear(x, f"{name}gate_proj")
            hidden = add("Mul", add("Mul", gate, add("Sigmoid", gate)), hidden)
        return self.linear(hidden, f"{name}down_proj")

    def apply_activation(self, x: str) -> str:
        """Apply ReLU, or GELU, x (1 + f) / 2, with f = erf(x / sqrt 2) or its tanh approximation (arXiv 1606.08415)."""
        add = self.graph.add_node
        if self.config.activation == "relu":
            return add("Relu", x)
        if self.config.activation == "gelu_erf":
            f = add("Erf", add("Div", x, self.graph.add_scalar(math.sqrt(2))))
        else:
            cubed = add("Mul", add("Pow", x, self.graph.add_scalar(3.0)), self.graph.add_scalar(0.044715))
            f = add("Tanh", add("Mul", add("Add", x, cubed), self.graph.add_scalar(math.sqrt(2 / math.pi))))
        return add("Mul", add("Mul", x, add("Add", f, self.graph.add_scalar(1.0))), self.graph.add_scalar(0.5))
