"""`WeightTable`: where the machine code finds the weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu.kernels.layout import ACTIVATIONS, FP32, INT8_ROWS, KINDS, LAYER, MATRIX, MODEL
from tinystories.errors import UserError
from tinystories.position_tables import build_rope_tables, build_sinusoid_table
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING, expected_shapes
from tinystories.weights.quantize import block_rows, gather_rows, quantized_sizes, round_up

Array = npt.NDArray[Any]
# Fields of a layer and the weights that they describe, if the model has them.
LAYER_NORMS = {
    LAYER.input_norm: "input_layernorm.weight",
    LAYER.input_norm_bias: "input_layernorm.bias",
    LAYER.post_norm: "post_attention_layernorm.weight",
    LAYER.post_norm_bias: "post_attention_layernorm.bias",
    LAYER.q_norm: "self_attn.q_norm.weight",
    LAYER.k_norm: "self_attn.k_norm.weight",
}
LAYER_MATRICES = {
    LAYER.q: "self_attn.q_proj",
    LAYER.k: "self_attn.k_proj",
    LAYER.v: "self_attn.v_proj",
    LAYER.o: "self_attn.o_proj",
    LAYER.gate: "mlp.gate_proj",
    LAYER.up: "mlp.up_proj",
    LAYER.down: "mlp.down_proj",
}
# Above this, matrices count as read from memory and not from the last cache, which has 16 to 32 MB on most processors.
CACHE_BYTES = 32_000_000
SHORTLIST_HEAD = "shortlist.weight"  # in memory only: the shortlist's rows of the LM head


class WeightTable:
    """The model table (`ModelLayout`) with the addresses of the weights.

    `table_address` is passed to the machine code, of which there is one for each `precision`. The arrays must stay
    alive as long as the table is used. Raises UserError if a weight does not have the size or dtype that `config`
    implies, or if matrices differ in precision.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], shortlist: Array | None = None) -> None:
        self.config, self.weights, self.shapes = config, weights, expected_shapes(config)
        self.table = table = np.zeros(MODEL.layers + config.n_layer * LAYER.size, dtype=np.int64)
        self.table_address = table.ctypes.data
        self.n_bytes = 0  # of the matrices, all of which are read for every row
        table[MODEL.n_layer], table[MODEL.n_embd], table[MODEL.n_head] = config.n_layer, config.n_embd, config.n_head
        table[MODEL.n_kv_head], table[MODEL.head_dim] = config.kv_heads, config.head_dim
        table[MODEL.n_ctx], table[MODEL.modern] = config.n_ctx, int(config.architecture == "modern")
        table[MODEL.activation], table[MODEL.scale_scores] = ACTIVATIONS[config.activation], int(config.scaled_scores)
        head = EMBEDDING if config.tied else LM_HEAD
        if shortlist is not None:
            self.weights = {**weights, **gather_shortlist_head(weights, head, shortlist, config.vocab_size)}
            self.shapes[SHORTLIST_HEAD] = (len(shortlist), config.n_embd)
            head = SHORTLIST_HEAD
        # Of all matrices; the embedding may have another.
        self.precision = "fp32" if head in self.weights else block_precision(self.weights, head)
        self.add_matrix(MODEL.lm_head, head.removesuffix(".weight"))
        self.add_vector(MODEL.norm, "norm.weight")
        self.add_vector(MODEL.norm_bias, "norm.bias")
        for i in range(config.n_layer):
            layer_base, prefix = MODEL.layers + i * LAYER.size, f"layers.{i}."
            table[layer_base + LAYER.window] = config.layer_window(i) or config.n_ctx
            for field, name in LAYER_NORMS.items():
                self.add_vector(layer_base + field, prefix + name)
            for field, name in LAYER_MATRICES.items():
                self.add_matrix(layer_base + field, prefix + name)
        self.add_embedding()
        table[MODEL.exceeds_caches] = int(self.n_bytes > CACHE_BYTES)

    def tensor_address(self, name: str, dtype: type, size: int) -> int:
        """Return the address of a weight; raise UserError unless it has this dtype and number of elements.

        The machine code cannot check either, and would read past the end.
        """
        array = self.weights[name]
        if array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
            raise UserError(f"weight {name} does not have the size or dtype that config.json implies")
        return array.ctypes.data

    def add_vector(self, index: int, name: str) -> None:
        """Write the address of a norm or bias to the table, if the model has it."""
        if name in self.shapes:
            self.table[index] = self.tensor_address(name, np.float32, self.shapes[name][0])

    def add_matrix(self, base: int, name: str) -> None:
        """Describe a matrix and its bias, if the model has them, at index `base`, in the precision of `weights`."""
        weight, table = f"{name}.weight", self.table
        if weight not in self.shapes:
            return
        out_features, in_features = self.shapes[weight]
        table[base + MATRIX.out_features], table[base + MATRIX.in_features] = out_features, in_features
        precision = "fp32" if weight in self.weights else block_precision(self.weights, weight)
        if base != MODEL.embedding and precision != self.precision:  # the machine code is for one precision
            raise UserError(f"weight {name} is in {precision}, and others are in {self.precision}")
        table[base + MATRIX.padded_out] = round_up(out_features, block_rows(precision))
        self.add_vector(base + MATRIX.bias, f"{name}.bias")
        if precision == "fp32":
            table[base + MATRIX.kind] = FP32
            table[base + MATRIX.weights] = self.tensor_address(weight, np.float32, out_features * in_features)
            self.n_bytes += self.weights[weight].nbytes
            return
        values, scales = quantized_sizes(precision, out_features, in_features)
        table[base + MATRIX.kind] = KINDS[precision]
        table[base + MATRIX.weights] = self.tensor_address(f"{weight}.{precision}", *values)
        self.n_bytes += self.weights[f"{weight}.{precision}"].nbytes
        table[base + MATRIX.scales] = self.tensor_address(f"{weight}.scales", *scales)

    def padded_out(self, base: int) -> int:
        """Return the padded out_features of the matrix that is described at index `base`."""
        return int(self.table[base + MATRIX.padded_out])

    def add_embedding(self) -> None:
        """Describe the token embedding and, for a classic model, the position embeddings (S, C)."""
        base, table, config = MODEL.embedding, self.table, self.config
        self._keepalive: tuple[Array, ...]
        if f"{EMBEDDING}.rows" in self.weights:
            values, scales = quantized_sizes("rows", config.vocab_size, config.n_embd)
            table[base + MATRIX.kind] = INT8_ROWS
            table[base + MATRIX.weights] = self.tensor_address(f"{EMBEDDING}.rows", *values)
            table[base + MATRIX.scales] = self.tensor_address(f"{EMBEDDING}.scales", *scales)
        else:  # tied to the LM head, or fp32
            n_bytes = self.n_bytes
            self.add_matrix(base, EMBEDDING.removesuffix(".weight"))
            self.n_bytes = n_bytes  # only some rows are read
        if config.learned_positions:
            n = config.n_ctx * config.n_embd
            table[MODEL.position_embedding] = self.tensor_address(POSITION_EMBEDDING, np.float32, n)
        elif config.architecture == "classic":
            self._keepalive = (build_sinusoid_table(config.n_ctx, config.n_embd),)
            table[MODEL.position_embedding] = self._keepalive[0].ctypes.data
        else:
            self._keepalive = build_rope_tables(config.n_ctx, config.head_dim, config.rope_base)
            table[MODEL.rope_cos], table[MODEL.rope_sin] = (array.ctypes.data for array in self._keepalive)


def block_precision(weights: Mapping[str, Array], name: str) -> str:
    """Return the precision, int8 or int4, in which a matrix is quantized."""
    return "int8" if f"{name}.int8" in weights else "int4"


def gather_shortlist_head(weights: Mapping[str, Array], head: str, ids: Array, vocab_size: int) -> dict[str, Array]:
    """Copy the rows of the LM head `head` for these ids to a matrix of their own, in the same precision."""
    if head in weights:
        return {SHORTLIST_HEAD: weights[head][ids]}
    precision = block_precision(weights, head)
    values, scales = gather_rows(precision, weights[f"{head}.{precision}"], weights[f"{head}.scales"], ids, vocab_size)
    return {f"{SHORTLIST_HEAD}.{precision}": values, f"{SHORTLIST_HEAD}.scales": scales}
