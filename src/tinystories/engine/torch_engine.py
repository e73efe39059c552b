"""The engine protocol on PyTorch: CUDA, MPS and CPU. Wraps a live model, in training too."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories.engine.cuda_graph import CudaGraphStep
from tinystories.engine.device import Precision, select_device, select_precision
from tinystories.engine.native_step import MAX_NATIVE_ROWS, NativeStep
from tinystories.engine.protocol import Ids, Logits, validate_context, validate_sequences, validate_slot, validate_step
from tinystories.errors import UserError
from tinystories.model import GPT, KVCache

if TYPE_CHECKING:
    from tinystories.checkpoint import ModelFiles

KV_LEN_STEP = 64  # attention looks at a multiple of this many cached positions
SCORE_BATCH_TOKENS_CPU = 2048  # tokens, padding included, of one batch of `logprobs`: what keeps a CPU's caches warm
SCORE_BATCH_TOKENS_CUDA = 32768
SCORE_LOGITS_BYTES_CPU = (
    24 * 2**20
)  # logits that `logprobs` holds at once; over 32 MiB glibc maps fresh memory for each
SCORE_LOGITS_BYTES_CUDA = 512 * 2**20


class TorchEngine:
    """`Engine` over a GPT. The cache is allocated at the first prefill, so scoring alone needs none.

    The model stays the caller's: its training mode is restored after each call and its weights are not changed, unless
    the engine may take it for its `own`: then bf16 casts its matrices once, not in every call.
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
    def load(
        cls, files: "ModelFiles", *, n_slots: int = 1, device: str | torch.device = "auto", precision: str = "auto"
    ) -> "TorchEngine":
        """The engine of a model directory."""
        from tinystories.checkpoint import copy_into_model, load_weights

        device = select_device(device)
        select_precision(device, precision)  # refuse before the weights are read
        model = GPT(files.config)
        if files.is_int8_only:
            from tinystories.engine.cpu.weights import dequantize

            copy_into_model(
                {name: torch.tensor(weight) for name, weight in dequantize(files).items()}, model, files.folder
            )
        else:
            load_weights(files, model)
        return cls(model.eval(), n_slots=n_slots, device=device, precision=precision, owns_model=True)

    def prefill(self, slot: int, ids: Ids) -> Logits:
        array = validate_context(ids, self.config)
        validate_slot(slot, self.n_slots)
        with self._inference_mode():
            view = self._cache_view(slot, slot + 1, len(array))
            view.length.zero_()
            hidden = self.model(torch.from_numpy(array)[None].to(self.device), view)
            logits = self._to_caller(self.model.logits(hidden[0, -1]))
        self.lengths[slot] = len(array)
        return logits

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        array = validate_step(slots, ids, self.lengths, self.config)
        low, high = self._row_range(slots)
        # Slots in between that are not asked for get a dummy token. It lands behind their ids, where the next real one
        # overwrites it, or on the last id of a full slot, which can only be prefilled anew.
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
        """The contiguous rows that a step computes: no cache is copied. On CUDA few spans, since each is recorded."""
        if self.device.type == "cuda":
            return 0, min(1 << max(slots).bit_length(), self.n_slots)
        return min(slots), max(slots) + 1

    def _step_rows(self, low: int, high: int, tokens: npt.NDArray[np.int64], lengths: list[int]) -> Tensor:
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
        """On a CPU as a NumPy array that shares the memory: sampling is up to three times as fast there."""
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
                for i, sequence_logprobs in zip(members, self._score_batch([arrays[i] for i in members]), strict=True):
                    results[i] = sequence_logprobs
        return [results[i] for i in range(len(arrays))]

    def _score_batch(self, arrays: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """Log-probabilities of a batch that is padded at its ends; causal attention never sees the padding."""
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
        return NativeStep(self.model) if (self.device.type, self.precision) == ("cpu", "fp32") else None

    @functools.cached_property
    def kv_cache(self) -> KVCache:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return KVCache(self.config, self.n_slots, device=self.device, dtype=dtype)

    def _cache_view(self, low: int, high: int, max_len: int) -> KVCache:
        """Rows low..high-1 of the cache, looking no further than the longest row needs."""
        view = self.kv_cache.view_rows(low, high)
        view.kv_len = min(-(-max_len // KV_LEN_STEP) * KV_LEN_STEP, self.config.n_ctx)
        return view

    @contextlib.contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """No gradients, no dropout, and the working precision; the model's mode is restored afterwards."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            # Casts are not cached: a training step's autocast around this call must not find casts without gradients.
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False),
            ):
                yield
        finally:
            if was_training:
                self.model.train()


def cast_linears_to_bf16(model: GPT) -> None:
    """Make the weights of all products bf16 in place; embeddings, norms and the residual stream stay fp32."""
    if model.config.tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def group_by_length(sizes: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped by similar size, longest first; size x count of a padded group stays within the budget."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        count = max(1, max_tokens // sizes[order[0]])
        yield order[:count]
        order = order[count:]
