"""Calls the machine code: `Runtime` runs a batch of rows on the thread pool, `Workspace` owns the buffers of a call."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.cpu import jit
from tinystories.engine.cpu.kernels.layout import (
    CALL,
    KEY_BLOCK,
    LAYER,
    MAX_PHASES,
    MODEL,
    PHASES_PER_LAYER,
    TILE_ROWS,
)
from tinystories.engine.cpu.thread_pool import shared_pool
from tinystories.engine.cpu.weight_table import WeightTable
from tinystories.errors import UserError
from tinystories.weights.quantize import GROUP_SIZE, allocate_aligned, round_up

Array = npt.NDArray[Any]
MAX_ROWS = 64  # rows per call: more rows reuse the weights more often but need more memory
# Below this many bytes of weights, times rows, a call has so little work between the points where threads wait for each
# other that a second thread gains nothing, and loses beside other programs (docs/cpu-engine-reference.md).
MIN_SHARED_BYTES = 20_000_000


class KVCacheAddress(NamedTuple):
    """Where a KV cache is: addresses of its keys and values, in the layouts of `CallLayout`."""

    keys: int
    values: int
    n_slots: int
    is_f16: bool = False


class Runtime:
    """Runs the forward pass on a thread pool."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        threads: int,
        shortlist: Array | None = None,
        *,
        min_shared_bytes: int = MIN_SHARED_BYTES,
        precision: str | None = None,
    ) -> None:
        """Compile or load the machine code and set up its tables.

        `weights`: fp32 arrays by their names in `model.safetensors`, or the quantized arrays of `load_or_quantize`.
        `shortlist`: ids whose rows of the LM head are computed; the logits of all other ids are -inf. Calls that
        multiply fewer than `min_shared_bytes` (bytes of weights times rows) use one thread, others all. `precision`:
        that of the weights (the default), or int8-a8 for int8 weights.
        """
        if PHASES_PER_LAYER * config.n_layer + 2 > MAX_PHASES:
            raise UserError(f"the CPU engine does not support {config.n_layer:,} layers; use --engine torch")
        self.config, self.n_threads, self.shortlist = config, threads, shortlist
        self.min_shared_bytes = min_shared_bytes
        shared_pool()  # now, so that the first calls from two threads do not make two
        self.weight_table = WeightTable(config, weights, shortlist)
        precision = precision or self.weight_table.precision
        if precision.removesuffix("-a8") != self.weight_table.precision:  # the machine code would misread the weights
            raise UserError(f"precision {precision} needs other weights than {self.weight_table.precision}")
        self.forward = jit.load_forward(precision)
        self.workspace = Workspace(config, self.weight_table, threads)

    def run(
        self, ids: Array, slots: Array, positions: Array, cache: KVCacheAddress, first_logits_row: int = 0
    ) -> npt.NDArray[np.float32]:
        """Run at most MAX_ROWS new tokens; return the logits (n_rows - first_logits_row, V) of the last rows, fp32.

        `ids`, `slots`, `positions` (n_rows,): each row's token, KV cache slot and position in it. Rows of the same slot
        must be in ascending order of position. The KV cache is read and written. Calls are serialized by the pool's
        lock. Raises IndexError if there are too many rows, or an id, slot or position is out of range.
        """
        workspace, call, n_rows = self.workspace, self.workspace.table, len(ids)
        if not 0 <= first_logits_row <= n_rows <= MAX_ROWS:
            raise IndexError("rows out of range")
        n_threads = self.n_threads if n_rows * self.weight_table.n_bytes >= self.min_shared_bytes else 1
        pool = shared_pool()  # not kept: after a fork the child needs a new one
        with pool.lock:  # also guards the workspace: callers may be several threads
            rows = workspace.rows[:, :n_rows]
            rows[0], rows[1], rows[2] = ids, slots, positions
            # As unsigned numbers, negative ones are too large.
            limits = (self.config.vocab_size, cache.n_slots, self.config.n_ctx)
            if not (rows.view(np.uint64) < np.array(limits, dtype=np.uint64)[:, None]).all():
                raise IndexError("ids, slots or positions out of range")
            call[CALL.n_rows], call[CALL.first_logits_row] = n_rows, first_logits_row
            call[CALL.keys], call[CALL.values], call[CALL.n_slots], call[CALL.kv_is_f16] = cache
            tables = self.weight_table.table_address, workspace.table_address
            pool.run(functools.partial(self.forward, *tables, self.config.norm_eps), n_threads)
            if self.shortlist is None:
                return workspace.logits[first_logits_row:n_rows, : self.config.vocab_size].copy()
            logits = np.full((n_rows - first_logits_row, self.config.vocab_size), -np.inf, dtype=np.float32)
            for row, shortlist_logits in zip(logits, workspace.logits[first_logits_row:n_rows], strict=True):
                row[self.shortlist] = shortlist_logits[
                    : len(self.shortlist)
                ]  # twice as fast as logits[:, shortlist] = ...
            return logits


class Workspace:
    """Buffers of a call and the call table (`CallLayout`) with their addresses."""

    def __init__(self, config: ModelConfig, weight_table: WeightTable, n_threads: int) -> None:
        C, attn_width = config.n_embd, config.n_head * config.head_dim
        self.table = np.zeros(CALL.size, dtype=np.int64)
        self.table_address = self.table.ctypes.data
        self._keepalive: list[Array] = []
        self.rows = self.allocate(CALL.ids, (3, MAX_ROWS), np.int64)  # ids, slots, positions
        self.table[CALL.slots], self.table[CALL.positions] = (self.rows[i].ctypes.data for i in (1, 2))
        self.allocate(CALL.x, (MAX_ROWS, C))
        self.logits = self.allocate(CALL.logits, (MAX_ROWS, weight_table.padded_out(MODEL.lm_head)))
        self.allocate(CALL.attn_out, (MAX_ROWS, attn_width))
        for field, writer in (
            (CALL.q, LAYER.q),
            (CALL.k, LAYER.k),
            (CALL.v, LAYER.v),
            (CALL.mlp_hidden, LAYER.up),
            (CALL.gate, LAYER.up),
            (CALL.delta, LAYER.down),
        ):
            self.allocate(field, (MAX_ROWS, weight_table.padded_out(MODEL.layers + writer)))
        # Scratch of each thread. Its memory map is at `ThreadContext` in kernels/memory.py, where `make_context`
        # computes the same offsets: change both together. Per row: x (4 bytes a column), quantized x (2 bytes a
        # column), its scale (4 bytes), and for each group the sum and the scale (4 bytes each); then the keys and the
        # values of a head in fp32. n_ctx matters because attention keeps the weights of whole contexts, and their sums,
        # in x. Rounding up to pages keeps threads off each other's cache lines.
        n_positions = round_up(config.n_ctx, KEY_BLOCK)
        score_floats = TILE_ROWS * (n_positions + 1)
        width = round_up(max(C, attn_width, config.n_ff, -(-score_floats // MAX_ROWS)), GROUP_SIZE)
        row_bytes = 4 * width + 2 * width + 4 + 2 * 4 * width // GROUP_SIZE
        scratch_bytes = round_up(MAX_ROWS * row_bytes + 2 * 4 * n_positions * config.head_dim, 4096)
        self.allocate(CALL.scratch, (n_threads, scratch_bytes), np.uint8)
        self.table[CALL.scratch_stride], self.table[CALL.scratch_width] = scratch_bytes, width
        self.table[CALL.max_rows] = MAX_ROWS

    def allocate(self, field: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Return a new array, uninitialized and aligned to a cache line; write its address to a field of the table."""
        array = allocate_aligned(shape, dtype)
        self.table[field] = array.ctypes.data
        self._keepalive.append(array)
        return array
