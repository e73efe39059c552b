"""The tables that the machine code reads, the memory it works in, and the calling of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu import native
from tinystories.engine.cpu.fields import BLOCK, CALL, FP32, GROUP, INT4, INT8, LAYER, MATRIX, MODEL
from tinystories.engine.cpu.packing import padded, unpack_int4, unpack_int8
from tinystories.engine.cpu.team import Team
from tinystories.positions import rotary_tables, sinusoid_table

Array = npt.NDArray[Any]
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
ROWS = 64  # of one call: more rows use the weights better, and need more memory


class Machine:
    """Runs new tokens through the model, in several threads."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], threads: int) -> None:
        """`weights`: fp32 arrays by their names in `model.safetensors`, or what `weights.pack` makes of them."""
        self.config = config
        self.forward = native.load()
        self.team = Team.of(threads)
        self.model = Model(config, weights)
        self.room = Room(config, self.model, threads)

    def run(
        self, ids: Array, slots: Array, positions: Array, keys: int, values: int, n_slots: int, first: int = 0
    ) -> npt.NDArray[np.float32]:
        """Logits (rows from `first` on, V) after at most ROWS new tokens, in memory that the next call overwrites.

        Each row has the slot and the position of its token; rows of one slot stand in the order of their positions.
        `keys`, `values`: addresses of (layers, n_slots, heads, S, D) fp32, which are read and written.
        """
        room, call, n_rows = self.room, self.room.call, len(ids)
        room.x[:n_rows] = self.model.embed(ids, positions)
        room.slots[:n_rows], room.positions[:n_rows] = slots, positions
        call[CALL.n_rows], call[CALL.first], call[CALL.n_slots] = n_rows, first, n_slots
        call[CALL.keys], call[CALL.values], call[CALL.arrived] = keys, values, room.counter[0]
        forward, model_at, call_at = self.forward, self.model.at, room.at
        eps, n_threads = self.config.norm_eps, self.team.n_threads
        self.team.run(lambda thread: forward(model_at, call_at, eps, thread, n_threads))
        return room.logits[first:n_rows, : self.config.vocab_size]


class Room:
    """Memory that calls work in, and the table that says where it is."""

    def __init__(self, config: ModelConfig, model: "Model", n_threads: int) -> None:
        C, q, k, up, head = config.n_embd, model.outer("q"), model.outer("k"), model.outer("up"), model.outer("head")
        self.call = np.zeros(CALL.size, dtype=np.int64)
        self.at = self.call.ctypes.data
        self.kept: list[Array] = []
        self.counter = self.array(CALL.counter, 1, np.int64)
        self.counter[0] = 0
        self.positions, self.slots = (self.array(at, ROWS, np.int64) for at in (CALL.positions, CALL.slots))
        self.x = self.array(CALL.x, (ROWS, C))
        self.logits = self.array(CALL.logits, (ROWS, head))
        widths = ((CALL.q, q), (CALL.k, k), (CALL.v, k), (CALL.mixed, C), (CALL.inner, up), (CALL.gate, up))
        for at, width in (*widths, (CALL.added, padded(C, BLOCK))):
            self.array(at, (ROWS, width))
        width = padded(max(C, config.n_ff, -(-config.n_ctx // ROWS)), GROUP)
        size = padded(ROWS * (4 * width + 2 * width + 4 + 4 * width // GROUP), 4096)
        self.array(CALL.own, (n_threads, size), np.uint8)
        self.call[CALL.own_size], self.call[CALL.width], self.call[CALL.capacity] = size, width, ROWS

    def array(self, at: int, shape: int | tuple[int, ...], kind: Any = np.float32) -> Array:
        """A new array, whose address goes into the table; it begins at a cache line of its own."""
        count = int(np.prod(shape))
        memory = np.empty(count * np.dtype(kind).itemsize + 128, dtype=np.uint8)
        begin = -memory.ctypes.data % 64
        array = memory[begin : begin + count * np.dtype(kind).itemsize].view(kind).reshape(shape)
        self.call[at] = array.ctypes.data
        self.kept.append(memory)
        return array


class Model:
    """The table that says where the weights are; embeds tokens."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.config, self.weights = config, weights
        self.kept: list[Array] = []
        self.table = table = np.zeros(MODEL.layers + config.n_layer * LAYER.size, dtype=np.int64)
        self.at = table.ctypes.data
        classic = config.architecture == "classic"
        table[MODEL.n_layer], table[MODEL.n_embd], table[MODEL.n_head] = config.n_layer, config.n_embd, config.n_head
        table[MODEL.n_kv_head], table[MODEL.head_dim] = config.kv_heads, config.head_dim
        table[MODEL.n_ctx], table[MODEL.modern] = config.n_ctx, int(not classic)
        table[MODEL.norm], table[MODEL.norm_bias] = self.vector("norm.weight"), self.vector("norm.bias")
        self.matrix(MODEL.head, EMBEDDING if config.tied else HEAD, config.vocab_size, config.n_embd)
        C, kv = config.n_embd, config.kv_heads * config.head_dim
        for i in range(config.n_layer):
            at, layer = MODEL.layers + i * LAYER.size, f"layers.{i}."
            for field, name in (
                (LAYER.input_norm, "input_layernorm.weight"),
                (LAYER.input_norm_bias, "input_layernorm.bias"),
                (LAYER.post_norm, "post_attention_layernorm.weight"),
                (LAYER.post_norm_bias, "post_attention_layernorm.bias"),
                (LAYER.q_norm, "self_attn.q_norm.weight"),
                (LAYER.k_norm, "self_attn.k_norm.weight"),
            ):
                table[at + field] = self.vector(layer + name)
            for field, name, rows, inner in (
                (LAYER.q, "self_attn.q_proj", C, C),
                (LAYER.k, "self_attn.k_proj", kv, C),
                (LAYER.v, "self_attn.v_proj", kv, C),
                (LAYER.o, "self_attn.o_proj", C, C),
                (LAYER.gate, "mlp.gate_proj", config.n_ff, C),
                (LAYER.up, "mlp.up_proj", config.n_ff, C),
                (LAYER.down, "mlp.down_proj", C, config.n_ff),
            ):
                if not (classic and field == LAYER.gate):
                    self.matrix(at + field, f"{layer}{name}.weight", rows, inner, f"{layer}{name}.bias")
        self.positions = self.position_tables()

    def vector(self, name: str) -> int:
        """Address of a vector; 0 where the model has none."""
        return self.weights[name].ctypes.data if name in self.weights else 0

    def matrix(self, at: int, name: str, rows: int, inner: int, bias: str = "") -> None:
        table = self.table
        table[at + MATRIX.rows], table[at + MATRIX.outer], table[at + MATRIX.inner] = rows, padded(rows, BLOCK), inner
        table[at + MATRIX.bias] = self.vector(bias)
        for kind, stored in ((FP32, name), (INT8, f"{name}.int8"), (INT4, f"{name}.int4")):
            if stored in self.weights:
                table[at + MATRIX.kind] = kind
                table[at + MATRIX.weights] = self.weights[stored].ctypes.data
                if kind != FP32:
                    table[at + MATRIX.scales] = self.weights[f"{name}.scales"].ctypes.data
                return
        raise AssertionError(f"no weights of {name}")

    def outer(self, name: str) -> int:
        """Padded number of rows of a matrix: of the head, or of a kind of matrix of the blocks."""
        at = MODEL.head if name == "head" else MODEL.layers + getattr(LAYER, name)
        return int(self.table[at + MATRIX.outer])

    def position_tables(self) -> Array | None:
        """The sinusoids of `classic`; of `modern` the tables of rotations, whose addresses go into the table."""
        config = self.config
        if config.architecture == "classic":
            return sinusoid_table(config.n_ctx, config.n_embd)
        for at, table in zip(
            (MODEL.cos, MODEL.sin), rotary_tables(config.n_ctx, config.head_dim, config.rope_base), strict=True
        ):
            self.table[at] = table.ctypes.data
            self.kept.append(table)
        return None

    def embed(self, ids: Array, positions: Array) -> Array:
        """(B, C) fp32."""
        weights, C = self.weights, self.config.n_embd
        if EMBEDDING in weights:
            x = weights[EMBEDDING][ids]
        elif f"{EMBEDDING}.rows" in weights:
            x = weights[f"{EMBEDDING}.rows"][ids] * weights[f"{EMBEDDING}.scales"][ids, None]
        else:  # the head's: its blocks that hold the ids are unpacked
            name, unpack = ("int8", unpack_int8) if f"{EMBEDDING}.int8" in weights else ("int4", unpack_int4)
            n_blocks = padded(self.config.vocab_size, BLOCK) // BLOCK
            blocks, scales = (weights[f"{EMBEDDING}.{part}"].reshape(n_blocks, -1) for part in (name, "scales"))
            wanted = ids // BLOCK
            every = unpack(blocks[wanted].reshape(-1), scales[wanted].reshape(-1), BLOCK * len(ids), C)
            x = every.reshape(len(ids), BLOCK, C)[np.arange(len(ids)), ids % BLOCK]
        return x if self.positions is None else x + self.positions[positions]
