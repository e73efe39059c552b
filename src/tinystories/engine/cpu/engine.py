"""`CpuEngine` implements the engine protocol without torch. docs/cpu-engine.md explains how and why."""

import contextlib
import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.cpu.kernels.layout import KEY_BLOCK
from tinystories.engine.cpu.runtime import MAX_ROWS, MIN_SHARED_BYTES, KVCacheAddress, Runtime
from tinystories.engine.cpu.sampler import Sampler
from tinystories.engine.cpu.thread_pool import count_physical_cores
from tinystories.engine.engine_config import DEFAULT_ENGINE_CONFIG, EngineConfig
from tinystories.engine.protocol import (
    Ids,
    Logits,
    validate_context,
    validate_extension,
    validate_sequences,
    validate_slot,
    validate_step,
)
from tinystories.engine.sampling_state import SamplingState
from tinystories.errors import UserError
from tinystories.weights.load import dequantize_weights, load_fp32, load_or_quantize
from tinystories.weights.quantize import round_up

Array = npt.NDArray[Any]


class CpuEngine:
    """An `Engine` that runs on the CPU in fp32, int8, int8-a8 or int4. See the protocol for its methods."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Array],
        engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
        *,
        shortlist_ids: Array | None = None,
    ) -> None:
        """Create an engine from the weights of `load_fp32` or `load_or_quantize`.

        `shortlist_ids`: ids whose logits are computed; those of all others are -inf. An engine with a shortlist can
        generate but not score. Raises UserError if the KV cache would not fit in memory.
        """
        n_slots = engine_config.n_slots
        # fp32 weights are for results that are as near as possible to the torch engine's.
        self.kv_dtype = np.float16 if any(name.endswith((".int8", ".int4")) for name in weights) else np.float32
        n_bytes = 2 * n_slots * kv_bytes(config, self.kv_dtype)
        if n_bytes > total_memory_bytes():
            raise UserError(
                f"{n_slots:,} slots need {n_bytes / 1e9:,.1f} GB of memory, more than this machine has; use fewer"
            )
        self.config, self.n_slots = config, n_slots
        self.lengths = [0] * n_slots
        # A number of threads that is given is used for every call.
        min_shared_bytes = 0 if engine_config.threads else MIN_SHARED_BYTES
        self.runtime = Runtime(
            config,
            weights,
            engine_config.threads or count_physical_cores(),
            shortlist_ids,
            min_shared_bytes=min_shared_bytes,
            precision="int8-a8" if engine_config.precision == "int8-a8" else None,
        )
        self.sampler = Sampler(n_slots, config.vocab_size)
        self._idle_scoring_caches: list[CpuKVCache] = []

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG,
        *,
        shortlist_ids: Array | None = None,
    ) -> "CpuEngine":
        """Load a model directory; verify its weights, and quantize them unless a cached quantized file is valid.

        Raises UserError if a setting is not supported or the weights are damaged.
        """
        dataclasses.replace(engine_config, engine="cpu")  # raises if this engine does not support a setting
        if engine_config.precision == "fp32":
            files.verify_weights()
            weights = load_fp32(files)
        else:
            weights = load_or_quantize(files, "int4" if engine_config.precision == "int4" else "int8")
        return cls(files.config, weights, engine_config, shortlist_ids=shortlist_ids)

    def fp32_weights(self) -> Mapping[str, Array]:
        return dequantize_weights(self.config, self.runtime.weight_table.weights)

    @functools.cached_property
    def kv_cache(self) -> "CpuKVCache":
        """The cache of the slots, allocated on first use."""
        return CpuKVCache(self.config, self.n_slots, self.kv_dtype)

    @contextlib.contextmanager
    def scoring_cache(self) -> Iterator["CpuKVCache"]:
        """Lend a cache of one slot to a call of `logprobs`, so that scoring leaves the slots alone.

        Calls from several threads at once get one each.
        """
        try:
            cache = self._idle_scoring_caches.pop()
        except IndexError:
            cache = CpuKVCache(self.config, 1, self.kv_dtype)
        yield cache
        self._idle_scoring_caches.append(cache)

    def prefill(self, slot: int, ids: Ids) -> Logits:
        validate_slot(slot, self.n_slots)
        return self.extend(slot, validate_context(ids, self.config), start=0)

    def extend(self, slot: int, ids: Ids, *, start: int | None = None, all_logits: bool = False) -> Logits:
        tokens, first = validate_extension(slot, ids, start, self.lengths, self.config)
        self.lengths[slot] = first  # what the slot holds if this call is interrupted
        chunks = self.forward_chunks(self.kv_cache, slot, tokens, all_logits=all_logits, first_position=first)
        chunk_logits = [logits for _, logits in chunks]
        self.lengths[slot] = first + len(tokens)
        return np.concatenate(chunk_logits) if all_logits else chunk_logits[-1][0]

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        tokens = validate_step(slots, ids, self.lengths, self.config)
        slot_array = np.array(slots, dtype=np.int64)
        positions = np.array([self.lengths[slot] for slot in slots], dtype=np.int64)
        chunk_logits = [
            self.runtime.run(tokens[chunk], slot_array[chunk], positions[chunk], self.kv_cache.address)
            for chunk in (slice(start, start + MAX_ROWS) for start in range(0, len(tokens), MAX_ROWS))
        ]
        for slot in slots:
            self.lengths[slot] += 1
        return chunk_logits[0] if len(chunk_logits) == 1 else np.concatenate(chunk_logits)

    def sample(self, logits: Logits, slots: Sequence[int], u: Sequence[float], state: SamplingState) -> list[int]:
        return self.sampler.sample(logits, slots, u, state)

    def free(self, slot: int) -> None:
        validate_slot(slot, self.n_slots)
        self.lengths[slot] = 0

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        if self.runtime.shortlist is not None:
            raise UserError("ids outside a shortlist have no probabilities; score without --shortlist")
        with self.scoring_cache() as cache:
            return [self._score(ids, cache) for ids in validate_sequences(sequences, self.config)]

    def _score(self, ids: npt.NDArray[np.int64], cache: "CpuKVCache") -> npt.NDArray[np.float64]:
        token_logprobs = np.empty(len(ids) - 1, dtype=np.float64)
        for start, logits in self.forward_chunks(cache, 0, ids[:-1], all_logits=True):
            logits -= logits.max(axis=1, keepdims=True)
            targets = ids[start + 1 : start + 1 + len(logits)]
            target_logits = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            # In fp64: beside a token that is nearly certain, fp32 loses the sum of all others, which is its surprise.
            log_totals = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
            token_logprobs[start : start + len(logits)] = target_logits - log_totals
        return token_logprobs

    def forward_chunks(
        self, cache: "CpuKVCache", slot: int, ids: Array, *, all_logits: bool, first_position: int = 0
    ) -> Iterator[tuple[int, Logits]]:
        """Run ids through a slot in chunks of MAX_ROWS; yield (index of its first id, logits) of each chunk.

        The ids are written from `first_position` on. Unless `all_logits`, only the logits of the last id are computed:
        the last chunk has one row, others have none.
        """
        for start in range(0, len(ids), MAX_ROWS):
            chunk = ids[start : start + MAX_ROWS]
            is_last = start + len(chunk) == len(ids)
            first_logits_row = 0 if all_logits else len(chunk) - is_last
            positions = np.arange(first_position + start, first_position + start + len(chunk))
            yield start, self.runtime.run(chunk, np.full(len(chunk), slot), positions, cache.address, first_logits_row)


class CpuKVCache:
    """KV cache: keys and values in fp32 or fp16, in the layouts of `layout.CallLayout`.

    The operating system commits its memory in small pages as they are written, so unused slots and positions cost
    nothing.
    """

    def __init__(self, config: ModelConfig, n_slots: int, dtype: type = np.float32) -> None:
        try:
            self.keys, self.values = (allocate_untouched(n_slots * kv_bytes(config, dtype)) for _ in range(2))
        except (MemoryError, OSError):
            raise UserError(f"not enough memory for {n_slots:,} slots; use fewer") from None
        self.address = KVCacheAddress(
            self.keys.ctypes.data, self.values.ctypes.data, n_slots, np.dtype(dtype) == np.float16
        )


def kv_bytes(config: ModelConfig, dtype: type) -> int:
    """Return the bytes of the keys, or of the values, of a slot."""
    n_positions = round_up(config.n_ctx, KEY_BLOCK) if dtype is np.float16 else config.n_ctx
    return config.n_layer * config.kv_heads * n_positions * config.head_dim * np.dtype(dtype).itemsize


def allocate_untouched(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Return zeros, of which the operating system commits a page of a few kilobytes when it is first written.

    NumPy asks Linux for pages of 2 MB, each of which would hold positions of many layers and slots.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.zeros(n_bytes, dtype=np.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def total_memory_bytes() -> float:
    """Return the physical memory of the machine; inf if the system does not report it."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
