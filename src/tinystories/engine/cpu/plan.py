"""The tables that the machine code reads, the memory it works in, and the calling of it."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu import native
from tinystories.engine.cpu.fields import (
    BLOCK,
    CALL,
    FP32,
    GELU_ERF,
    GELU_TANH,
    GROUP,
    INT4,
    INT8,
    LAYER,
    MATRIX,
    MODEL,
    RELU,
)
from tinystories.engine.cpu.packing import aligned, padded, rows_of, unpack_int4, unpack_int8
from tinystories.engine.cpu.team import Team
from tinystories.errors import UserError
from tinystories.positions import rotary_tables, sinusoid_table

Array = npt.NDArray[Any]
EMBEDDING, POSITIONS, HEAD = "embed_tokens.weight", "embed_positions.weight", "lm_head.weight"
ACTIVATIONS = {"relu": RELU, "gelu_tanh": GELU_TANH, "gelu_erf": GELU_ERF}
SHORT_HEAD = "shortlist.weight"  # made of some rows of the head
ROWS = 64  # of one call: more rows use the weights better, and need more memory


class Machine:
    """Runs new tokens through the model, in several threads."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Array], threads: int, shortlist: Array | None = None
    ) -> None:
        """`weights`: fp32 arrays by their names in `model.safetensors`, or what `weights.pack` makes of them.

        `shortlist`: ids whose rows of the head are computed; the logits of all others are -inf.
        """
        self.config, self.n_threads, self.shortlist = config, threads, shortlist
        self.forward = native.load()
        self.model = Model(config, weights, shortlist)
        self.room = Room(config, self.model, threads)

    def run(
        self, ids: Array, slots: Array, positions: Array, keys: int, values: int, n_slots: int, first: int = 0
    ) -> npt.NDArray[np.float32]:
        """Logits (rows from `first` on, V) after at most ROWS new tokens. One call at a time: others wait.

        Each row has the slot and the position of its token; rows of one slot stand in the order of their positions.
        `keys`, `values`: addresses of (layers, n_slots, heads, S, D) fp32, which are read and written.
        """
        room, call, n_rows = self.room, self.room.call, len(ids)
        inside = (slots >= 0) & (slots < n_slots) & (positions >= 0) & (positions < self.config.n_ctx)
        if not (0 <= first <= n_rows <= ROWS and inside.all()):
            raise IndexError("rows, slots or positions outside the memory there is")
        team = Team.of(self.n_threads)  # each time: a forked process has a new one
        with team.busy:
            room.x[:n_rows] = self.model.embed(ids, positions)
            room.slots[:n_rows], room.positions[:n_rows] = slots, positions
            call[CALL.n_rows], call[CALL.first], call[CALL.n_slots] = n_rows, first, n_slots
            call[CALL.keys], call[CALL.values] = keys, values
            call[CALL.counter], call[CALL.arrived] = team.counter.ctypes.data, team.counter[0]
            team.run(functools.partial(self.forward, self.model.at, room.at, self.config.norm_eps))
            if self.shortlist is None:
                return room.logits[first:n_rows, : self.config.vocab_size].copy()
            logits = np.full((n_rows - first, self.config.vocab_size), -np.inf, dtype=np.float32)
            for row, found in zip(logits, room.logits[first:n_rows, : len(self.shortlist)], strict=True):
                row[self.shortlist] = found  # half the time of logits[:, shortlist] = ...
            return logits


class Room:
    """Memory that calls work in, and the table that says where it is."""

    def __init__(self, config: ModelConfig, model: "Model", n_threads: int) -> None:
        C, q, k, up, head = config.n_embd, model.outer("q"), model.outer("k"), model.outer("up"), model.outer("head")
        mixed = config.n_head * config.head_dim
        self.call = np.zeros(CALL.size, dtype=np.int64)
        self.at = self.call.ctypes.data
        self.kept: list[Array] = []
        self.positions, self.slots = (self.array(at, ROWS, np.int64) for at in (CALL.positions, CALL.slots))
        self.x = self.array(CALL.x, (ROWS, C))
        self.logits = self.array(CALL.logits, (ROWS, head))
        widths = ((CALL.q, q), (CALL.k, k), (CALL.v, k), (CALL.mixed, mixed), (CALL.inner, up), (CALL.gate, up))
        for at, width in (*widths, (CALL.added, padded(C, BLOCK))):
            self.array(at, (ROWS, width))
        width = padded(max(C, mixed, config.n_ff, -(-config.n_ctx // ROWS)), GROUP)
        size = padded(ROWS * (4 * width + 2 * width + 4 + 2 * 4 * width // GROUP), 4096)
        self.array(CALL.own, (n_threads, size), np.uint8)
        self.call[CALL.own_size], self.call[CALL.width], self.call[CALL.capacity] = size, width, ROWS

    def array(self, at: int, shape: int | tuple[int, ...], kind: Any = np.float32) -> Array:
        """As `aligned`; its address goes into the table."""
        array = aligned(shape, kind)
        self.call[at] = array.ctypes.data
        self.kept.append(array)
        return array


class Model:
    """The table that says where the weights are; embeds tokens."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], shortlist: Array | None = None) -> None:
        self.config, self.weights = config, weights
        self.kept: list[Array] = []
        self.table = table = np.zeros(MODEL.layers + config.n_layer * LAYER.size, dtype=np.int64)
        self.at = table.ctypes.data
        classic = config.architecture == "classic"
        table[MODEL.n_layer], table[MODEL.n_embd], table[MODEL.n_head] = config.n_layer, config.n_embd, config.n_head
        table[MODEL.n_kv_head], table[MODEL.head_dim] = config.kv_heads, config.head_dim
        table[MODEL.n_ctx], table[MODEL.modern] = config.n_ctx, int(not classic)
        table[MODEL.activation], table[MODEL.scaled] = ACTIVATIONS[config.activation], int(config.scaled_scores)
        C, D, F = config.n_embd, config.head_dim, config.n_ff
        q, kv = config.n_head * D, config.kv_heads * D
        table[MODEL.norm] = self.address("norm.weight", np.float32, C)
        if classic:
            table[MODEL.norm_bias] = self.address("norm.bias", np.float32, C)
        if shortlist is None:
            self.matrix(MODEL.head, EMBEDDING if config.tied else HEAD, config.vocab_size, C)
        else:
            self.weights = {**weights, **self.short_head(shortlist)}
            self.matrix(MODEL.head, SHORT_HEAD, len(shortlist), C)
        for i in range(config.n_layer):
            at, layer = MODEL.layers + i * LAYER.size, f"layers.{i}."
            table[at + LAYER.window] = config.window_of(i) or config.n_ctx
            for field, norm in ((LAYER.input_norm, "input_layernorm"), (LAYER.post_norm, "post_attention_layernorm")):
                table[at + field] = self.address(f"{layer}{norm}.weight", np.float32, C)
                if classic:
                    table[at + field + 1] = self.address(f"{layer}{norm}.bias", np.float32, C)
            if config.qk_norm and not classic:
                for field, norm in ((LAYER.q_norm, "q_norm"), (LAYER.k_norm, "k_norm")):
                    table[at + field] = self.address(f"{layer}self_attn.{norm}.weight", np.float32, D)
            for field, name, rows, inner in (
                (LAYER.q, "self_attn.q_proj", q, C),
                (LAYER.k, "self_attn.k_proj", kv, C),
                (LAYER.v, "self_attn.v_proj", kv, C),
                (LAYER.o, "self_attn.o_proj", C, q),
                (LAYER.gate, "mlp.gate_proj", F, C),
                (LAYER.up, "mlp.up_proj", F, C),
                (LAYER.down, "mlp.down_proj", C, F),
            ):
                if not (classic and field == LAYER.gate):
                    biased = config.qkv_bias if field in (LAYER.q, LAYER.k, LAYER.v) else classic
                    self.matrix(at + field, f"{layer}{name}.weight", rows, inner, f"{layer}{name}.bias" * biased)
        self.positions = self.position_tables()

    def address(self, name: str, kind: type, size: int) -> int:
        """Of an array, which the machine code will believe to be of this type and size."""
        array = self.weights[name]
        if array.dtype != kind or array.size != size or not array.flags.c_contiguous:
            raise UserError(f"weight {name} is not of the model's size or type")
        return array.ctypes.data

    def matrix(self, at: int, name: str, rows: int, inner: int, bias: str = "") -> None:
        table, outer = self.table, padded(rows, BLOCK)
        table[at + MATRIX.rows], table[at + MATRIX.outer], table[at + MATRIX.inner] = rows, outer, inner
        if bias:
            table[at + MATRIX.bias] = self.address(bias, np.float32, rows)
        groups = padded(inner, GROUP) // GROUP
        if name in self.weights:
            kind, weights, scales = FP32, self.address(name, np.float32, rows * inner), 0
        elif f"{name}.int8" in self.weights:
            kind, weights = INT8, self.address(f"{name}.int8", np.uint8, outer * padded(inner, 8))
            scales = self.address(f"{name}.scales", np.float32, outer)
        else:
            kind, weights = INT4, self.address(f"{name}.int4", np.uint8, outer * groups * GROUP // 2)
            scales = self.address(f"{name}.scales", np.uint16, outer * groups)
        table[at + MATRIX.kind], table[at + MATRIX.weights], table[at + MATRIX.scales] = kind, weights, scales

    def short_head(self, ids: Array) -> dict[str, Array]:
        """The rows of the head for these ids, as a matrix of its own."""
        weights, head, V = self.weights, EMBEDDING if self.config.tied else HEAD, self.config.vocab_size
        if head in weights:
            return {SHORT_HEAD: weights[head][ids]}
        kind, words = (
            ("int8", (np.uint16, np.float32)) if f"{head}.int8" in weights else ("int4", (np.uint32, np.uint16))
        )
        return {
            f"{SHORT_HEAD}.{part}": rows_of(weights[f"{head}.{part}"], ids, word, V)
            for part, word in zip((kind, "scales"), words, strict=True)
        }

    def outer(self, name: str) -> int:
        """Padded number of rows of a matrix: of the head, or of a kind of matrix of the blocks."""
        at = MODEL.head if name == "head" else MODEL.layers + getattr(LAYER, name)
        return int(self.table[at + MATRIX.outer])

    def position_tables(self) -> Array | None:
        """What `classic` adds to embeddings; of `modern` the tables of rotations, whose addresses go into the table."""
        config = self.config
        if config.learned_positions:
            return self.weights[POSITIONS].reshape(config.n_ctx, config.n_embd)
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
