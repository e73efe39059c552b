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
from tinystories.engine.cpu.plan import ROWS, Machine
from tinystories.engine.cpu.team import physical_cores
from tinystories.engine.cpu.weights import Precision, packed, source_of
from tinystories.engine.protocol import Ids, Logits, check_slot, checked_context, checked_sequences, checked_step
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
        most = 4 * (os.cpu_count() or 1)
        if threads is not None and not 1 <= threads <= most:
            raise UserError(f"the number of threads must be from 1 to {most} (4 for each core), not {threads}")
        n_bytes = 8 * n_slots * config.n_layer * config.kv_heads * config.n_ctx * config.head_dim
        if n_bytes > memory_bytes():
            raise UserError(
                f"{n_slots:,} slots need {n_bytes / 1e9:,.1f} GB of memory, more than there is; ask for fewer"
            )
        self.config, self.n_slots = config, n_slots
        self.lengths = [0] * n_slots
        self.machine = Machine(config, weights, threads or physical_cores(), shortlist)

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
        weights = source_of(files) if precision == "fp32" else packed(files, precision)
        return cls(files.config, weights, n_slots=n_slots, threads=threads, shortlist=shortlist)

    @functools.cached_property
    def cache(self) -> "Cache":
        return Cache(self.config, self.n_slots)

    @functools.cached_property
    def scratch(self) -> "Cache":
        """For sequences that are only scored."""
        return Cache(self.config, 1)

    def prefill(self, slot: int, ids: Ids) -> Logits:
        array = checked_context(ids, self.config)
        check_slot(slot, self.n_slots)
        self.lengths[slot] = 0  # if it is interrupted
        *_, (_, logits) = self.read(self.cache, slot, array, everything=False)
        self.lengths[slot] = len(array)
        return logits[0]

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        array = checked_step(slots, ids, self.lengths, self.config)
        where = np.array(slots, dtype=np.int64)
        positions = np.array([self.lengths[slot] for slot in slots], dtype=np.int64)
        parts = [
            self.run(self.cache, array[part], where[part], positions[part], 0)
            for part in (slice(start, start + ROWS) for start in range(0, len(array), ROWS))
        ]
        for slot in slots:
            self.lengths[slot] += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def free(self, slot: int) -> None:
        check_slot(slot, self.n_slots)
        self.lengths[slot] = 0

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        if self.machine.shortlist is not None:
            raise UserError("a shortlist gives no probabilities of the ids it leaves out; score without --shortlist")
        results = []
        for ids in checked_sequences(sequences, self.config):
            scored = np.empty(len(ids) - 1, dtype=np.float32)
            for start, logits in self.read(self.scratch, 0, ids[:-1], everything=True):
                logits -= logits.max(axis=1, keepdims=True)
                targets = ids[start + 1 : start + 1 + len(logits)]
                chosen = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
                scored[start : start + len(logits)] = chosen - np.log(np.exp(logits).sum(axis=1))
            results.append(scored)
        return results

    def read(self, cache: "Cache", slot: int, ids: Array, *, everything: bool) -> Iterator[tuple[int, Logits]]:
        """(first position, logits) of the ids' chunks; of the last id alone unless `everything` is wanted."""
        for start in range(0, len(ids), ROWS):
            part = ids[start : start + ROWS]
            last = start + len(part) == len(ids)
            first = 0 if everything else len(part) - last
            positions = np.arange(start, start + len(part))
            yield start, self.run(cache, part, np.full(len(part), slot), positions, first)

    def run(self, cache: "Cache", ids: Array, slots: Array, positions: Array, first: int) -> Logits:
        """As `Machine.run`, with a cache."""
        keys, values = cache.keys.ctypes.data, cache.values.ctypes.data
        return self.machine.run(ids, slots, positions, keys, values, cache.n_slots, first)


class Cache:
    """Keys and values of slots: (layers, slots, heads, S, D) fp32 each. Memory is taken as it is written."""

    def __init__(self, config: ModelConfig, n_slots: int) -> None:
        shape = (config.n_layer, n_slots, config.kv_heads, config.n_ctx, config.head_dim)
        try:
            self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        except MemoryError:
            raise UserError(f"there is no memory for {n_slots:,} slots; ask for fewer") from None
        self.n_slots = n_slots


def memory_bytes() -> float:
    """Of the machine; without end where it does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
