"""The `Engine` protocol on PyTorch: CUDA, MPS and CPU. Can wrap a model that is being trained."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories.checkpoint import ModelFiles, state_dict_to_save
from tinystories.engine.cuda_graph import CudaGraphStep
from tinystories.engine.device import Precision, select_device, select_precision
from tinystories.engine.engine_config import DEFAULT_ENGINE_CONFIG, EngineConfig
from tinystories.engine.native_step import MAX_NATIVE_ROWS, NativeStep
from tinystories.engine.protocol import (
    Ids,
    Logits,
    validate_context,
    validate_extension,
    validate_sequences,
    validate_slot,
    validate_step,
)
from tinystories.errors import UserError
from tinystories.model import GPT, KVCache
from tinystories.weights.load import load_fp32
from tinystories.weights.names import check_weights
from tinystories.weights.safetensors_file import Array

KV_LEN_STEP = 64  # attention reads a number of cached positions that is a multiple of this
# Tokens per batch of `logprobs`, padding included. The CPU value keeps a batch in the CPU's caches.
SCORE_BATCH_TOKENS_CPU = 2048
SCORE_BATCH_TOKENS_CUDA = 32768
# Bytes of logits that `logprobs` holds at once. Above 32 MiB, glibc maps fresh memory for every allocation.
SCORE_LOGITS_BYTES_CPU = 24 * 2**20
SCORE_LOGITS_BYTES_CUDA = 512 * 2**20


class TorchEngine:
    """`Engine` for a GPT. The KV cache is allocated by the first prefill, so scoring alone does not allocate it.

    The training mode of the model is restored after each call and its weights are not changed. With `owns_model`, the
    engine may change the weights: in bf16 it casts the matrices once instead of in every call.
    """

    def __init__(
        self,
        model: GPT,
        *,
        n_slots: int = 1,
        device: str | torch.device = "auto",
        precision: str = "auto",
        owns_model: bool = False,
    ) -> None:
        if n_slots < 1:
            raise UserError(f"the number of slots must be at least 1, not {n_slots}")
        self.device = select_device(device)
        self.precision: Precision = select_precision(self.device, precision)
        self.model = model.to(self.device)
        self.config = model.config
        self.n_slots = n_slots
        self.lengths = [0] * n_slots  # ids in each slot; the cache's own lengths are set from these
        self.cuda_graphs: dict[int, CudaGraphStep] = {}  # by number of rows
        if owns_model and self.precision == "bf16":
            cast_linears_to_bf16(model)

    @classmethod
    def load(cls, files: ModelFiles, engine_config: EngineConfig = DEFAULT_ENGINE_CONFIG) -> "TorchEngine":
        """Load the model of a model directory (weights in fp32, or dequantized if it has only int8 weights)."""
        device = select_device(engine_config.device)
        precision = select_precision(device, engine_config.precision)  # raise before reading the weights
        model = load_model(files)
        return cls(model.eval(), n_slots=engine_config.n_slots, device=device, precision=precision, owns_model=True)

    def fp32_weights(self) -> Mapping[str, npt.NDArray[np.float32]]:
        return {name: weight.float().numpy(force=True) for name, weight in state_dict_to_save(self.model).items()}

    def prefill(self, slot: int, ids: Ids) -> Logits:
        validate_slot(slot, self.n_slots)
        return self.extend(slot, validate_context(ids, self.config), start=0)

    def extend(self, slot: int, ids: Ids, *, start: int | None = None, all_logits: bool = False) -> Logits:
        array, first = validate_extension(slot, ids, start, self.lengths, self.config)
        with self._inference_mode():
            view = self._cache_view(slot, slot + 1, first + len(array))
            view.length.fill_(first)
            hidden = self.model(torch.from_numpy(array)[None].to(self.device), view)[0]
            logits = self._to_caller(self.model.logits(hidden if all_logits else hidden[-1]))
        self.lengths[slot] = first + len(array)
        return logits

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        array = validate_step(slots, ids, self.lengths, self.config)
        low, high = self._row_range(slots)
        # The step computes rows low..high-1; the other slots in this range get a dummy token. Its keys and values are
        # written after the slot's last position, where the next real token overwrites them, or to the last position of
        # a full slot, which cannot be stepped again before some of its ids, this one among them, are replaced.
        rows = [slot - low for slot in slots]
        tokens = np.zeros(high - low, dtype=np.int64)
        tokens[rows] = array
        lengths = [min(length, self.config.n_ctx - 1) for length in self.lengths[low:high]]
        with self._inference_mode():
            logits = self._to_caller(self._step_rows(low, high, tokens, lengths))
        for slot in slots:
            self.lengths[slot] += 1
        return logits if rows == list(range(high - low)) else logits[rows]

    def _row_range(self, slots: Sequence[int]) -> tuple[int, int]:
        """Return the range low..high-1 of cache rows that a step computes; contiguous, so that the cache is not copied.

        On CUDA the range starts at 0 and its size is a power of two (or n_slots), because each size is recorded as a
        graph of its own.
        """
        if self.device.type == "cuda":
            return 0, min(1 << max(slots).bit_length(), self.n_slots)
        return min(slots), max(slots) + 1

    def _step_rows(self, low: int, high: int, tokens: npt.NDArray[np.int64], lengths: list[int]) -> Tensor:
        """Return the logits (high - low, V) after one token in each of the rows low..high-1."""
        if self.device.type == "cuda":
            if high not in self.cuda_graphs:
                self.cuda_graphs[high] = CudaGraphStep(self.model, self.kv_cache, high, lengths)
            return self.cuda_graphs[high](tokens, lengths)
        view = self._cache_view(low, high, max(lengths) + 1)
        if high - low <= MAX_NATIVE_ROWS and self.native_step is not None:
            return self.native_step(torch.from_numpy(tokens), view, lengths)
        view.length.copy_(torch.tensor(lengths))
        hidden = self.model(torch.from_numpy(tokens)[:, None].to(self.device), view)
        return self.model.logits(hidden[:, -1])

    def _to_caller(self, logits: Tensor) -> Logits:
        """Return fp32 logits; on a CPU as a NumPy view, which makes sampling up to three times faster."""
        logits = logits.float()
        return logits.numpy() if self.device.type == "cpu" else logits

    def free(self, slot: int) -> None:
        validate_slot(slot, self.n_slots)
        self.lengths[slot] = 0

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        arrays = validate_sequences(sequences, self.config)
        results: dict[int, npt.NDArray[np.floating[Any]]] = {}
        max_tokens = SCORE_BATCH_TOKENS_CPU if self.device.type == "cpu" else SCORE_BATCH_TOKENS_CUDA
        with self._inference_mode():
            for members in group_by_length([len(ids) - 1 for ids in arrays], max_tokens):
                results |= zip(members, self._score_batch([arrays[i] for i in members]), strict=True)
        return [results[i] for i in range(len(arrays))]

    def _score_batch(self, arrays: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """Return the log-probabilities of a right-padded batch; causal attention never sees the padding."""
        sizes = [len(ids) - 1 for ids in arrays]
        tokens = np.zeros((len(arrays), max(sizes)), dtype=np.int64)
        is_token = np.arange(max(sizes)) < np.array(sizes)[:, None]
        tokens[is_token] = np.concatenate([ids[:-1] for ids in arrays])
        targets = torch.from_numpy(np.concatenate([ids[1:] for ids in arrays])).to(self.device)
        hidden = self.model(torch.from_numpy(tokens).to(self.device))[torch.from_numpy(is_token).to(self.device)]
        logits_bytes = SCORE_LOGITS_BYTES_CPU if self.device.type == "cpu" else SCORE_LOGITS_BYTES_CUDA
        rows_per_chunk = max(1, logits_bytes // (4 * self.config.vocab_size))
        nats = [
            F.cross_entropy(self.model.logits(h).float(), y, reduction="none")
            for h, y in zip(hidden.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
        ]
        flat_logprobs = -torch.cat(nats).cpu().numpy()
        return np.split(flat_logprobs, np.cumsum(sizes)[:-1])

    @functools.cached_property
    def native_step(self) -> NativeStep | None:
        """The compiled decode step of the CPU engine; None unless this engine runs in fp32 on a CPU."""
        return NativeStep(self.model) if (self.device.type, self.precision) == ("cpu", "fp32") else None

    @functools.cached_property
    def kv_cache(self) -> KVCache:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return KVCache(self.config, self.n_slots, device=self.device, dtype=dtype)

    def _cache_view(self, low: int, high: int, max_len: int) -> KVCache:
        """Return rows low..high-1 of the cache; attention reads only `max_len` positions, rounded up to KV_LEN_STEP."""
        view = self.kv_cache.view_rows(low, high)
        view.kv_len = min(-(-max_len // KV_LEN_STEP) * KV_LEN_STEP, self.config.n_ctx)
        return view

    @contextlib.contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Disable gradients and dropout and enable the engine's precision; restore the training mode afterwards."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            # cache_enabled=False: a training step whose autocast context surrounds this call must not reuse weights
            # that were cast without gradients.
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False),
            ):
                yield
        finally:
            if was_training:
                self.model.train()


def load_model(files: ModelFiles) -> GPT:
    """Return the model of a model directory, on the CPU; int8 weights are dequantized. `UserError` as `load_weights`.

    The weights are checked before memory is taken for the sizes in config.json, which may be damaged.
    """
    weights = load_fp32(files)
    model = GPT(files.config)
    copy_weights(weights, model)
    return model


def load_weights(files: ModelFiles, model: GPT) -> None:
    """Copy the weights of a model directory into a model; int8 weights are dequantized.

    Raises `UserError` if a name or shape is not that of the model, or a weight is not finite.
    """
    weights = load_fp32(files)
    check_weights({name: weight.shape for name, weight in weights.items()}, model.config, str(files.weights_path))
    copy_weights(weights, model)


def copy_weights(weights: Mapping[str, Array], model: GPT) -> None:
    """Copy weights, which have been checked, into a model; the head may be missing where it is tied."""
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()}, strict=False)


def cast_linears_to_bf16(model: GPT) -> None:
    """Cast the weights of all linear layers to bf16 in place; embeddings, norms and the residual stream stay fp32.

    A tied output head is untied first.
    """
    if model.config.tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def group_by_length(sizes: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield groups of indices of similar size, longest first.

    The padded size of a group (longest size times count) is at most `max_tokens`, except for a single longer item.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        count = max(1, max_tokens // sizes[order[0]])
        yield order[:count]
        order = order[count:]
