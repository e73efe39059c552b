"""Calls the machine code: `Runtime` runs a batch of rows, `WeightTable` and `Workspace` own the tables that it reads.

`layout` names the fields of the tables, `kernels` is the code that reads them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu import jit
from tinystories.engine.cpu.layout import (
    BLOCK_ROWS,
    CALL,
    FP32,
    GELU_ERF,
    GELU_TANH,
    GROUP_SIZE,
    INT4,
    INT8,
    LAYER,
    MATRIX,
    MODEL,
    RELU,
)
from tinystories.engine.cpu.quantize import allocate_aligned, dequantize_int4, dequantize_int8, gather_rows, round_up
from tinystories.engine.cpu.thread_pool import ThreadPool
from tinystories.errors import UserError
from tinystories.position_tables import build_rope_tables, build_sinusoid_table

Array = npt.NDArray[Any]
EMBEDDING, POSITION_EMBEDDING, LM_HEAD = "embed_tokens.weight", "embed_positions.weight", "lm_head.weight"
ACTIVATIONS = {"relu": RELU, "gelu_tanh": GELU_TANH, "gelu_erf": GELU_ERF}
SHORTLIST_HEAD = "shortlist.weight"  # in memory only: the shortlist's rows of the LM head
MAX_ROWS = 64  # rows per call: more rows reuse the weights more often but need more memory


class Runtime:
    """Runs the forward pass on a thread pool."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Array], threads: int, shortlist: Array | None = None
    ) -> None:
        """Compile or load the machine code and set up its tables.

        `weights`: fp32 arrays by their names in `model.safetensors`, or the quantized arrays of `weights.quantize`.
        `shortlist`: ids whose rows of the LM head are computed; the logits of all other ids are -inf.
        """
        self.config, self.n_threads, self.shortlist = config, threads, shortlist
        self.forward = jit.load_forward()
        self.weight_table = WeightTable(config, weights, shortlist)
        self.workspace = Workspace(config, self.weight_table, threads)

    def run(
        self,
        ids: Array,
        slots: Array,
        positions: Array,
        keys: int,
        values: int,
        n_slots: int,
        first_logits_row: int = 0,
    ) -> npt.NDArray[np.float32]:
        """Run at most MAX_ROWS new tokens; return the logits (n_rows - first_logits_row, V) of the last rows, fp32.

        `ids`, `slots`, `positions` (n_rows,): each row's token, KV cache slot and position in it. Rows of the same slot
        must be in ascending order of position. `keys`, `values`: addresses of the KV cache, each (layers, n_slots, KV
        heads, S, D) fp32, read and written. Calls are serialized by the pool's lock. Raises IndexError if there are too
        many rows, or a slot or position is out of range.
        """
        workspace, call, n_rows = self.workspace, self.workspace.table, len(ids)
        in_range = (slots >= 0) & (slots < n_slots) & (positions >= 0) & (positions < self.config.n_ctx)
        if not (0 <= first_logits_row <= n_rows <= MAX_ROWS and in_range.all()):
            raise IndexError("rows, slots or positions out of range")
        pool = ThreadPool.shared(self.n_threads)  # not kept: after a fork the child needs a new one
        with pool.lock:
            workspace.x[:n_rows] = self.weight_table.embed(ids, positions)
            workspace.slots[:n_rows], workspace.positions[:n_rows] = slots, positions
            call[CALL.n_rows], call[CALL.first_logits_row], call[CALL.n_slots] = n_rows, first_logits_row, n_slots
            call[CALL.keys], call[CALL.values] = keys, values
            call[CALL.barrier_counter], call[CALL.barrier_start] = pool.counter.ctypes.data, pool.counter[0]
            pool.run(
                functools.partial(
                    self.forward, self.weight_table.table_address, workspace.table_address, self.config.norm_eps
                )
            )
            if self.shortlist is None:
                return workspace.logits[first_logits_row:n_rows, : self.config.vocab_size].copy()
            logits = np.full((n_rows - first_logits_row, self.config.vocab_size), -np.inf, dtype=np.float32)
            for row, shortlist_logits in zip(
                logits, workspace.logits[first_logits_row:n_rows, : len(self.shortlist)], strict=True
            ):
                row[self.shortlist] = shortlist_logits  # twice as fast as logits[:, shortlist] = ...
            return logits


class Workspace:
    """Buffers of a call and the call table (`CallLayout`) with their addresses."""

    def __init__(self, config: ModelConfig, weight_table: "WeightTable", n_threads: int) -> None:
        C, q, k, up, lm_head = (
            config.n_embd,
            weight_table.padded_out("q"),
            weight_table.padded_out("k"),
            weight_table.padded_out("up"),
            weight_table.padded_out("head"),
        )
        attn_width = config.n_head * config.head_dim
        self.table = np.zeros(CALL.size, dtype=np.int64)
        self.table_address = self.table.ctypes.data
        self._keepalive: list[Array] = []
        self.positions, self.slots = (
            self.allocate(field, MAX_ROWS, np.int64) for field in (CALL.positions, CALL.slots)
        )
        self.x = self.allocate(CALL.x, (MAX_ROWS, C))
        self.logits = self.allocate(CALL.logits, (MAX_ROWS, lm_head))
        widths = (
            (CALL.q, q),
            (CALL.k, k),
            (CALL.v, k),
            (CALL.attn_out, attn_width),
            (CALL.mlp_hidden, up),
            (CALL.gate, up),
        )
        for field, width in (*widths, (CALL.delta, round_up(C, BLOCK_ROWS))):
            self.allocate(field, (MAX_ROWS, width))
        # Scratch of each thread. Its memory map is at `ThreadScratch` in kernels.py, whose `forward` computes the same
        # offsets: change both together. Per row: x (4 bytes a column), quantized x (2 bytes a column), its scale (4
        # bytes), and for each group the sum and the scale (4 bytes each). n_ctx matters because attention keeps the
        # weights of a whole context in x. Rounding up to pages keeps threads off each other's cache lines.
        width = round_up(max(C, attn_width, config.n_ff, -(-config.n_ctx // MAX_ROWS)), GROUP_SIZE)
        scratch_bytes = round_up(MAX_ROWS * (4 * width + 2 * width + 4 + 2 * 4 * width // GROUP_SIZE), 4096)
        self.allocate(CALL.scratch, (n_threads, scratch_bytes), np.uint8)
        self.table[CALL.scratch_stride], self.table[CALL.scratch_width], self.table[CALL.max_rows] = (
            scratch_bytes,
            width,
            MAX_ROWS,
        )

    def allocate(self, field: int, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Return a new array, uninitialized and aligned to a cache line; write its address to a field of the table."""
        array = allocate_aligned(shape, dtype)
        self.table[field] = array.ctypes.data
        self._keepalive.append(array)
        return array


class WeightTable:
    """The model table (`ModelLayout`) with the addresses of the weights; also embeds tokens.

    `table_address` is passed to the machine code. The arrays must stay alive as long as the table is used.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], shortlist: Array | None = None) -> None:
        self.config, self.weights = config, weights
        self._keepalive: list[Array] = []
        self.table = table = np.zeros(MODEL.layers + config.n_layer * LAYER.size, dtype=np.int64)
        self.table_address = table.ctypes.data
        classic = config.architecture == "classic"
        table[MODEL.n_layer], table[MODEL.n_embd], table[MODEL.n_head] = config.n_layer, config.n_embd, config.n_head
        table[MODEL.n_kv_head], table[MODEL.head_dim] = config.kv_heads, config.head_dim
        table[MODEL.n_ctx], table[MODEL.modern] = config.n_ctx, int(not classic)
        table[MODEL.activation], table[MODEL.scale_scores] = ACTIVATIONS[config.activation], int(config.scaled_scores)
        C, D, F = config.n_embd, config.head_dim, config.n_ff
        q, kv = config.n_head * D, config.kv_heads * D
        table[MODEL.norm] = self.tensor_address("norm.weight", np.float32, C)
        if classic:
            table[MODEL.norm_bias] = self.tensor_address("norm.bias", np.float32, C)
        if shortlist is None:
            self.add_matrix(MODEL.lm_head, EMBEDDING if config.tied else LM_HEAD, config.vocab_size, C)
        else:
            self.weights = {**weights, **self.gather_shortlist_head(shortlist)}
            self.add_matrix(MODEL.lm_head, SHORTLIST_HEAD, len(shortlist), C)
        for i in range(config.n_layer):
            layer_base, prefix = MODEL.layers + i * LAYER.size, f"layers.{i}."
            table[layer_base + LAYER.window] = config.layer_window(i) or config.n_ctx
            for field, norm in ((LAYER.input_norm, "input_layernorm"), (LAYER.post_norm, "post_attention_layernorm")):
                table[layer_base + field] = self.tensor_address(f"{prefix}{norm}.weight", np.float32, C)
                if classic:
                    table[layer_base + field + 1] = self.tensor_address(f"{prefix}{norm}.bias", np.float32, C)
            if config.qk_norm and not classic:
                for field, norm in ((LAYER.q_norm, "q_norm"), (LAYER.k_norm, "k_norm")):
                    table[layer_base + field] = self.tensor_address(f"{prefix}self_attn.{norm}.weight", np.float32, D)
            for field, name, out_features, in_features in (
                (LAYER.q, "self_attn.q_proj", q, C),
                (LAYER.k, "self_attn.k_proj", kv, C),
                (LAYER.v, "self_attn.v_proj", kv, C),
                (LAYER.o, "self_attn.o_proj", C, q),
                (LAYER.gate, "mlp.gate_proj", F, C),
                (LAYER.up, "mlp.up_proj", F, C),
                (LAYER.down, "mlp.down_proj", C, F),
            ):
                if not (classic and field == LAYER.gate):
                    has_bias = config.qkv_bias if field in (LAYER.q, LAYER.k, LAYER.v) else classic
                    self.add_matrix(
                        layer_base + field,
                        f"{prefix}{name}.weight",
                        out_features,
                        in_features,
                        f"{prefix}{name}.bias" * has_bias,
                    )
        self.position_embedding = self.make_position_tables()

    def tensor_address(self, name: str, dtype: type, size: int) -> int:
        """Return the address of a weight; raise UserError unless it has this dtype and number of elements.

        The machine code cannot check either, and would read past the end.
        """
        array = self.weights[name]
        if array.dtype != dtype or array.size != size or not array.flags.c_contiguous:
            raise UserError(f"weight {name} does not have the size or dtype that config.json implies")
        return array.ctypes.data

    def add_matrix(self, base: int, name: str, out_features: int, in_features: int, bias: str = "") -> None:
        """Describe a matrix at index `base`, in the precision in which `weights` has it; `bias` is a name, or empty."""
        table, padded_out = self.table, round_up(out_features, BLOCK_ROWS)
        table[base + MATRIX.out_features], table[base + MATRIX.padded_out], table[base + MATRIX.in_features] = (
            out_features,
            padded_out,
            in_features,
        )
        if bias:
            table[base + MATRIX.bias] = self.tensor_address(bias, np.float32, out_features)
        n_groups = round_up(in_features, GROUP_SIZE) // GROUP_SIZE
        if name in self.weights:
            kind, weights, scales = FP32, self.tensor_address(name, np.float32, out_features * in_features), 0
        elif f"{name}.int8" in self.weights:
            kind, weights = INT8, self.tensor_address(f"{name}.int8", np.uint8, padded_out * round_up(in_features, 8))
            scales = self.tensor_address(f"{name}.scales", np.float32, padded_out)
        else:
            kind, weights = INT4, self.tensor_address(f"{name}.int4", np.uint8, padded_out * n_groups * GROUP_SIZE // 2)
            scales = self.tensor_address(f"{name}.scales", np.uint16, padded_out * n_groups)
        table[base + MATRIX.kind], table[base + MATRIX.weights], table[base + MATRIX.scales] = kind, weights, scales

    def gather_shortlist_head(self, ids: Array) -> dict[str, Array]:
        """Copy the rows of the LM head for these ids to a matrix of their own, in the same precision."""
        weights, head, V = self.weights, EMBEDDING if self.config.tied else LM_HEAD, self.config.vocab_size
        if head in weights:
            return {SHORTLIST_HEAD: weights[head][ids]}
        precision, unit_dtypes = (
            ("int8", (np.uint16, np.float32)) if f"{head}.int8" in weights else ("int4", (np.uint32, np.uint16))
        )
        return {
            f"{SHORTLIST_HEAD}.{part}": gather_rows(weights[f"{head}.{part}"], ids, unit_dtype, V)
            for part, unit_dtype in zip((precision, "scales"), unit_dtypes, strict=True)
        }

    def padded_out(self, name: str) -> int:
        """Return the padded out_features of "head" or of a matrix of the layers (a field of `LayerLayout`)."""
        base = MODEL.lm_head if name == "head" else MODEL.layers + getattr(LAYER, name)
        return int(self.table[base + MATRIX.padded_out])

    def make_position_tables(self) -> Array | None:
        """Return the (S, C) position embeddings of a classic model.

        For a modern model, write the addresses of the RoPE tables to the model table and return None.
        """
        config = self.config
        if config.learned_positions:
            return self.weights[POSITION_EMBEDDING].reshape(config.n_ctx, config.n_embd)
        if config.architecture == "classic":
            return build_sinusoid_table(config.n_ctx, config.n_embd)
        for field, table in zip(
            (MODEL.rope_cos, MODEL.rope_sin),
            build_rope_tables(config.n_ctx, config.head_dim, config.rope_base),
            strict=True,
        ):
            self.table[field] = table.ctypes.data
            self._keepalive.append(table)
        return None

    def embed(self, ids: Array, positions: Array) -> Array:
        """Return the embeddings (B, C) of the tokens, fp32, position embeddings included."""
        weights, C = self.weights, self.config.n_embd
        if EMBEDDING in weights:
            x = weights[EMBEDDING][ids]
        elif f"{EMBEDDING}.rows" in weights:
            x = weights[f"{EMBEDDING}.rows"][ids] * weights[f"{EMBEDDING}.scales"][ids, None]
        else:  # tied to the quantized LM head: dequantize the blocks of 8 rows that contain the ids
            name, dequantize = (
                ("int8", dequantize_int8) if f"{EMBEDDING}.int8" in weights else ("int4", dequantize_int4)
            )
            n_blocks = round_up(self.config.vocab_size, BLOCK_ROWS) // BLOCK_ROWS
            blocks, scales = (weights[f"{EMBEDDING}.{part}"].reshape(n_blocks, -1) for part in (name, "scales"))
            block_ids = ids // BLOCK_ROWS
            block_rows = dequantize(
                blocks[block_ids].reshape(-1), scales[block_ids].reshape(-1), BLOCK_ROWS * len(ids), C
            )
            x = block_rows.reshape(len(ids), BLOCK_ROWS, C)[np.arange(len(ids)), ids % BLOCK_ROWS]
        return x if self.position_embedding is None else x + self.position_embedding[positions]
