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

from tinystories.engine.decoder import FEW_ROWS, Decoder
from tinystories.engine.device import Precision, pick_device, pick_precision
from tinystories.engine.graph import StepGraph
from tinystories.engine.protocol import Ids, Logits, check_slot, checked_context, checked_sequences, checked_step
from tinystories.errors import UserError
from tinystories.model import GPT, KVCache

if TYPE_CHECKING:
    from tinystories.checkpoint import ModelFiles

HORIZON_STEP = 64  # attention looks at a multiple of this many cached positions
SCORED_AT_ONCE = 2048  # tokens, padding included, of one batch of `logprobs`: what keeps a CPU's caches warm
SCORED_ON_GPU = 32768
LOGITS_BYTES = 24 * 2**20  # logits that `logprobs` holds at once; over 32 MiB glibc maps fresh memory for each
LOGITS_ON_GPU = 512 * 2**20


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
        own: bool = False,
    ) -> None:
        if n_slots < 1:
            raise UserError(f"the number of slots must be at least 1, not {n_slots}")
        self.device = pick_device(device)
        self.precision: Precision = pick_precision(self.device, precision)
        self.model = model.to(self.device)
        self.config = model.config
        self.n_slots = n_slots
        self.lengths = [0] * n_slots  # ids in each slot; the cache's own lengths are set from these
        self.graphs: dict[int, StepGraph] = {}  # by number of rows
        if own and self.precision == "bf16":
            cast_matrices(model)

    @classmethod
    def load(
        cls, files: "ModelFiles", *, n_slots: int = 1, device: str | torch.device = "auto", precision: str = "auto"
    ) -> "TorchEngine":
        """The engine of a model directory."""
        from tinystories.checkpoint import load_weights, put_weights

        device = pick_device(device)
        pick_precision(device, precision)  # refuse before the weights are read
        model = GPT(files.config)
        if files.is_packed:
            from tinystories.engine.cpu.weights import unpacked

            put_weights({name: torch.tensor(weight) for name, weight in unpacked(files).items()}, model, files.folder)
        else:
            load_weights(files, model)
        return cls(model.eval(), n_slots=n_slots, device=device, precision=precision, own=True)

    def prefill(self, slot: int, ids: Ids) -> Logits:
        array = checked_context(ids, self.config)
        check_slot(slot, self.n_slots)
        with self.running():
            view = self.view(slot, slot + 1, len(array))
            view.length.zero_()
            hidden = self.model(torch.from_numpy(array)[None].to(self.device), view)
            logits = self.handed_out(self.model.logits(hidden[0, -1]))
        self.lengths[slot] = len(array)
        return logits

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        array = checked_step(slots, ids, self.lengths, self.config)
        low, high = self.span(slots)
        # Slots in between that are not asked for get a dummy token. It lands behind their ids, where the next real one
        # overwrites it, or on the last id of a full slot, which can only be prefilled anew.
        rows = [slot - low for slot in slots]
        tokens = np.zeros(high - low, dtype=np.int64)
        tokens[rows] = array
        lengths = [min(length, self.config.n_ctx - 1) for length in self.lengths[low:high]]
        with self.running():
            logits = self.handed_out(self.step_rows(low, high, tokens, lengths))
        for slot in slots:
            self.lengths[slot] += 1
        return logits if rows == list(range(high - low)) else logits[rows]

    def span(self, slots: Sequence[int]) -> tuple[int, int]:
        """The contiguous rows that a step computes: no cache is copied. On CUDA few spans, since each is recorded."""
        if self.device.type == "cuda":
            return 0, min(1 << max(slots).bit_length(), self.n_slots)
        return min(slots), max(slots) + 1

    def step_rows(self, low: int, high: int, tokens: npt.NDArray[np.int64], lengths: list[int]) -> Tensor:
        if self.device.type == "cuda":
            if high not in self.graphs:
                self.graphs[high] = StepGraph(self.model, self.cache, high, lengths)
            return self.graphs[high](tokens, lengths)
        view = self.view(low, high, max(lengths) + 1)
        if high - low <= FEW_ROWS and self.decoder is not None:
            return self.decoder(torch.from_numpy(tokens), view, lengths)
        view.length.copy_(torch.tensor(lengths))
        hidden = self.model(torch.from_numpy(tokens)[:, None].to(self.device), view)
        return self.model.logits(hidden[:, -1])

    def handed_out(self, logits: Tensor) -> Logits:
        """On a CPU as a NumPy array that shares the memory: sampling is up to three times as fast there."""
        logits = logits.float()
        return logits.numpy() if self.device.type == "cpu" else logits

    def free(self, slot: int) -> None:
        check_slot(slot, self.n_slots)
        self.lengths[slot] = 0

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        arrays = checked_sequences(sequences, self.config)
        results: dict[int, npt.NDArray[np.floating[Any]]] = {}
        budget = SCORED_AT_ONCE if self.device.type == "cpu" else SCORED_ON_GPU
        with self.running():
            for members in batches([len(ids) - 1 for ids in arrays], budget):
                for i, scored in zip(members, self.score([arrays[i] for i in members]), strict=True):
                    results[i] = scored
        return [results[i] for i in range(len(arrays))]

    def score(self, arrays: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """Log-probabilities of a batch that is padded at its ends; causal attention never sees the padding."""
        sizes = [len(ids) - 1 for ids in arrays]
        tokens = np.zeros((len(arrays), max(sizes)), dtype=np.int64)
        real = np.arange(max(sizes)) < np.array(sizes)[:, None]
        tokens[real] = np.concatenate([ids[:-1] for ids in arrays])
        targets = torch.from_numpy(np.concatenate([ids[1:] for ids in arrays])).to(self.device)
        hidden = self.model(torch.from_numpy(tokens).to(self.device))[torch.from_numpy(real).to(self.device)]
        held = LOGITS_BYTES if self.device.type == "cpu" else LOGITS_ON_GPU
        rows = max(1, held // (4 * self.config.vocab_size))
        nats = [
            F.cross_entropy(self.model.logits(h).float(), y, reduction="none")
            for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        flat = -torch.cat(nats).cpu().numpy()
        return np.split(flat, np.cumsum(sizes)[:-1])

    @functools.cached_property
    def decoder(self) -> Decoder | None:
        return Decoder(self.model) if (self.device.type, self.precision) == ("cpu", "fp32") else None

    @functools.cached_property
    def cache(self) -> KVCache:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return KVCache(self.config, self.n_slots, device=self.device, dtype=dtype)

    def view(self, low: int, high: int, longest: int) -> KVCache:
        """Rows low..high-1 of the cache, looking no further than the longest row needs."""
        view = self.cache.rows(low, high)
        view.horizon = min(-(-longest // HORIZON_STEP) * HORIZON_STEP, self.config.n_ctx)
        return view

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, no dropout, and the working precision; the model's mode is restored afterwards."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            # Casts are not cached: a training step's autocast around this call must not find casts without gradients.
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False),
            ):
                yield
        finally:
            if training:
                self.model.train()


def cast_matrices(model: GPT) -> None:
    """Make the weights of all products bf16 in place; embeddings, norms and the residual stream stay fp32."""
    if model.config.tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def batches(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped by similar size, longest first; size x count of a padded group stays within the budget."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        count = max(1, budget // sizes[order[0]])
        yield order[:count]
        order = order[count:]
