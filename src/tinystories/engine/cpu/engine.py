"""The engine protocol without torch: machine code over mapped weights (docs/cpu-engine.md explains how and why)."""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.cpu.runtime import MAX_ROWS, Runtime
from tinystories.engine.cpu.thread_pool import count_physical_cores
from tinystories.engine.cpu.weights import Precision, load_fp32, load_or_quantize
from tinystories.engine.protocol import Ids, Logits, validate_context, validate_sequences, validate_slot, validate_step
from tinystories.errors import UserError

Array = npt.NDArray[Any]


class CpuEngine:
    """`Engine` over weights as `weights.source_of` (fp32) or `weights.packed` give them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        *,
        n_slots: int = 1,
        threads: int | None = None,
        shortlist: Array | None = None,
    ) -> None:
        """With `shortlist` the logits of ids that are not in it are -inf; such an engine writes, and scores nothing."""
        if n_slots < 1:
            raise UserError(f"the number of slots must be at least 1, not {n_slots}")
        max_threads = 4 * (os.cpu_count() or 1)
        if threads is not None and not 1 <= threads <= max_threads:
            raise UserError(f"the number of threads must be from 1 to {max_threads} (4 for each core), not {threads}")
        n_bytes = 8 * n_slots * config.n_layer * config.kv_heads * config.n_ctx * config.head_dim
        if n_bytes > total_memory_bytes():
            raise UserError(
                f"{n_slots:,} slots need {n_bytes / 1e9:,.1f} GB of memory, more than there is; ask for fewer"
            )
        self.config, self.n_slots = config, n_slots
        self.lengths = [0] * n_slots
        self.runtime = Runtime(config, weights, threads or count_physical_cores(), shortlist)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        precision: Precision = "int8",
        n_slots: int = 1,
        threads: int | None = None,
        shortlist: Array | None = None,
    ) -> "CpuEngine":
        """The engine of a model directory, whose weights need not have been checked; packs them where needed."""
        if precision not in get_args(Precision):
            raise UserError(f"the CPU engine has no precision {precision}; use {', '.join(get_args(Precision))}")
        if precision == "fp32":
            files.check_weights()
        weights = load_fp32(files) if precision == "fp32" else load_or_quantize(files, precision)
        return cls(files.config, weights, n_slots=n_slots, threads=threads, shortlist=shortlist)

    @functools.cached_property
    def kv_cache(self) -> "CpuKVCache":
        return CpuKVCache(self.config, self.n_slots)

    @functools.cached_property
    def scoring_cache(self) -> "CpuKVCache":
        """For sequences that are only scored."""
        return CpuKVCache(self.config, 1)

    def prefill(self, slot: int, ids: Ids) -> Logits:
        tokens = validate_context(ids, self.config)
        validate_slot(slot, self.n_slots)
        self.lengths[slot] = 0  # if it is interrupted
        *_, (_, logits) = self.forward_chunks(self.kv_cache, slot, tokens, all_logits=False)
        self.lengths[slot] = len(tokens)
        return logits[0]

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        tokens = validate_step(slots, ids, self.lengths, self.config)
        slot_array = np.array(slots, dtype=np.int64)
        positions = np.array([self.lengths[slot] for slot in slots], dtype=np.int64)
        chunk_logits = [
            self.forward(self.kv_cache, tokens[chunk], slot_array[chunk], positions[chunk], 0)
            for chunk in (slice(start, start + MAX_ROWS) for start in range(0, len(tokens), MAX_ROWS))
        ]
        for slot in slots:
            self.lengths[slot] += 1
        return chunk_logits[0] if len(chunk_logits) == 1 else np.concatenate(chunk_logits)

    def free(self, slot: int) -> None:
        validate_slot(slot, self.n_slots)
        self.lengths[slot] = 0

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        if self.runtime.shortlist is not None:
            raise UserError("a shortlist gives no probabilities of the ids it leaves out; score without --shortlist")
        results = []
        for ids in validate_sequences(sequences, self.config):
            token_logprobs = np.empty(len(ids) - 1, dtype=np.float32)
            for start, logits in self.forward_chunks(self.scoring_cache, 0, ids[:-1], all_logits=True):
                logits -= logits.max(axis=1, keepdims=True)
                targets = ids[start + 1 : start + 1 + len(logits)]
                target_logits = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
                token_logprobs[start : start + len(logits)] = target_logits - np.log(np.exp(logits).sum(axis=1))
            results.append(token_logprobs)
        return results

    def forward_chunks(
        self, cache: "CpuKVCache", slot: int, ids: Array, *, all_logits: bool
    ) -> Iterator[tuple[int, Logits]]:
        """(first position, logits) of the ids' chunks; of the last id alone unless `everything` is wanted."""
        for start in range(0, len(ids), MAX_ROWS):
            chunk = ids[start : start + MAX_ROWS]
            is_last = start + len(chunk) == len(ids)
            first_logits_row = 0 if all_logits else len(chunk) - is_last
            positions = np.arange(start, start + len(chunk))
            yield start, self.forward(cache, chunk, np.full(len(chunk), slot), positions, first_logits_row)

    def forward(self, cache: "CpuKVCache", ids: Array, slots: Array, positions: Array, first_logits_row: int) -> Logits:
        """As `Machine.run`, with a cache."""
        keys, values = cache.keys.ctypes.data, cache.values.ctypes.data
        return self.runtime.run(ids, slots, positions, keys, values, cache.n_slots, first_logits_row)


class CpuKVCache:
    """Keys and values of slots: (layers, slots, heads, S, D) fp32 each. Memory is taken as it is written."""

    def __init__(self, config: ModelConfig, n_slots: int) -> None:
        shape = (config.n_layer, n_slots, config.kv_heads, config.n_ctx, config.head_dim)
        try:
            self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        except MemoryError:
            raise UserError(f"there is no memory for {n_slots:,} slots; ask for fewer") from None
        self.n_slots = n_slots


def total_memory_bytes() -> float:
    """Of the machine; without end where it does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
