"""`Trace`: what a model computes for one sequence, and `LogitLens`: what its layers would predict.

Letters in shapes: T tokens, C = n_embd, V vocabulary, S stages, n positions, k most likely ids.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.protocol import Ids, validate_ids
from tinystories.engine.trace.layers import Floats
from tinystories.engine.trace.model import TraceModel
from tinystories.errors import UserError

Ints = npt.NDArray[np.int64]
Head = tuple[int, int]  # (layer, head), both from 0
# Logits that are computed at once. With everything made from them they take about 64 MB.
LOGITS_PER_CHUNK = 1 << 21


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Next-token predictions read from the hidden states at S stages and n positions.

    A stage is the embedding or a block; its hidden states go through the model's last norm and LM head, which were
    trained for the last stage only. Early stages can therefore mislead. "Final" is the last stage of the model, whether
    it is among the S or not; "next" is the id that follows in the sequence. After the last id nothing follows: its
    `next_probs` are NaN, its `next_ranks` 0.
    """

    stages: Ints  # (S,) 0: the embedding; i: after block i - 1; n_layer: the model's output
    positions: Ints  # (n,)
    top_ids: Ints  # (S, n, k) the most likely ids, in descending order
    top_probs: Floats  # (S, n, k)
    entropy_bits: Floats  # (S, n)
    final_ids: Ints  # (n,) the most likely id of the final stage
    final_probs: Floats  # (S, n) probability of that id
    final_ranks: Ints  # (S, n) its rank; 1: the most likely
    next_probs: Floats  # (S, n) probability of the id that follows
    next_ranks: Ints  # (S, n)
    next_bits: Floats  # (S, n) -log2 of next_probs, also where these underflow
    kl_bits: Floats  # (S, n) KL divergence of the final prediction from the stage's; 0 in the final stage


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The hidden states of a sequence of T ids, and what follows from them.

    Only the hidden states are stored, (n_layer + 1) * T * C * 4 bytes; attention and predictions are computed from them
    when they are asked for, and kept by the properties. Layers, heads and positions count from 0.
    """

    model: TraceModel = dataclasses.field(repr=False)
    ids: Ints  # (T,)
    hidden: Floats = dataclasses.field(repr=False)  # (n_layer + 1, T, C): the embedding, then after each block
    ablated: tuple[Head, ...] = ()  # heads whose outputs were replaced by zeros

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @functools.cached_property
    def attention(self) -> Floats:
        """Attention probabilities (n_layer, n_head, T, T): how much a token (row) takes from each token (column).

        n_layer * n_head * T * T * 4 bytes; `layer_attention` needs a layer's share only.
        """
        return np.stack([self.layer_attention(layer) for layer in range(self.config.n_layer)])

    def layer_attention(self, layer: int) -> Floats:
        """Return the attention probabilities (n_head, T, T) of one layer."""
        check_layer(layer, self.config)
        return self.model.attention_probs(self.hidden[layer], layer)

    def attention_bytes(self, layer: int) -> npt.NDArray[np.uint8]:
        """Return the attention of a layer as bytes (n_head, T, T): round(255 * sqrt(p)), so that small p stay visible.

        p = (byte / 255)^2 within 0.004.
        """
        return np.rint(np.sqrt(self.layer_attention(layer)) * 255).astype(np.uint8)

    def logits(self, positions: slice | Sequence[int] | Ints = slice(None)) -> Floats:
        """Return the logits (n, V) of the id after each of the positions."""
        return self.model.logits(self.hidden[-1, positions])

    @functools.cached_property
    def predictions(self) -> LogitLens:
        """The model's predictions after each position: the final stage alone (S = 1), with its 8 most likely ids."""
        return read_hidden(self, [self.config.n_layer], np.arange(len(self.ids)), top=8)

    @property
    def surprise_bits(self) -> Floats:
        """Surprise of each id (T,): -log2 of its probability given the ids before it; NaN for the first."""
        return np.concatenate(([np.float32(np.nan)], self.predictions.next_bits[0, :-1]))

    @property
    def ranks(self) -> Ints:
        """Rank of each id (T,) among all ids at its place, 1 for the most likely; 0 for the first, which has none."""
        return np.concatenate(([0], self.predictions.next_ranks[0, :-1]))

    @property
    def mean_bits(self) -> float:
        """Mean surprise of the ids after the first, in bits; NaN if there is only one id."""
        return float(self.surprise_bits[1:].mean()) if len(self.ids) > 1 else float("nan")

    def logit_lens(self, *, top: int = 5, positions: Iterable[int] | None = None) -> LogitLens:
        """Return what each of the n_layer + 1 stages predicts after each position (default: all)."""
        chosen = np.arange(len(self.ids)) if positions is None else np.array(list(positions), dtype=np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self.ids)):
            raise UserError(f"a position of the logit lens is outside the text of {len(self.ids)} tokens")
        return read_hidden(self, range(self.config.n_layer + 1), chosen, top)

    def ablate(self, heads: Iterable[Head]) -> Self:
        """Return the trace of the same ids with these (layer, head) pairs switched off as well: their outputs are 0.

        The cost of a head is `ablate([(layer, head)]).mean_bits - mean_bits`. Raises `UserError` for a pair that the
        model does not have.
        """
        new_heads = {(int(layer), int(head)) for layer, head in heads}
        for layer, head in new_heads:
            check_layer(layer, self.config)
            if not 0 <= head < self.config.n_head:
                raise UserError(f"head {head} does not exist: a layer has {self.config.n_head}, numbered from 0")
        ablated = tuple(sorted(new_heads.union(self.ablated)))
        hidden = self.hidden.copy()
        # Blocks before the first change compute what they did before.
        run_blocks(self.model, hidden, ablated, first=min((layer for layer, _ in new_heads), default=len(hidden)))
        return dataclasses.replace(self, hidden=hidden, ablated=ablated)


def compute_hidden(
    model: TraceModel, ids: Ids, *, window: bool = False, known: Floats | None = None
) -> tuple[Ints, Floats]:
    """Run ids through a model; return the ids used (T,) and the hidden states (n_layer + 1, T, C) of a `Trace`.

    With `window`, the last n_ctx ids of a longer sequence are used, at positions from 0. `known` (n_layer + 1, P, C)
    are the hidden states of the first P < T ids, which are not computed again. Raises `UserError` if there are no ids,
    too many, or one is not in the vocabulary. Besides the result, memory is needed for at most
    T * (6 * T + 2 * n_ff + 8 * C) numbers of 4 bytes, whatever the number of heads.
    """
    n_ctx = model.config.n_ctx
    if window:
        ids = ids[-n_ctx:]
    if not 1 <= len(ids) <= n_ctx:
        raise UserError(
            f"{len(ids)} token ids cannot be traced: the model takes 1 to {n_ctx} (model.n_ctx); shorten the text, or"
            " trace its last part with window=True (--window)"
        )
    id_array = validate_ids(ids, model.config.vocab_size)
    hidden = np.empty((model.config.n_layer + 1, len(id_array), model.config.n_embd), dtype=np.float32)
    hidden[0] = model.embed(id_array)
    n_known = 0 if known is None else known.shape[1]
    assert n_known < len(id_array), "what is known must leave something to compute"
    if known is not None:
        hidden[:, :n_known] = known
    run_blocks(model, hidden, first_token=n_known)
    return id_array, hidden


def compute_trace(model: TraceModel, ids: Ids, *, window: bool = False) -> Trace:
    """Return the trace of 1..n_ctx ids; see `compute_hidden`."""
    id_array, hidden = compute_hidden(model, ids, window=window)
    return Trace(model=model, ids=id_array, hidden=hidden)


def run_blocks(
    model: TraceModel, hidden: Floats, ablated: Sequence[Head] = (), first: int = 0, first_token: int = 0
) -> None:
    """Fill hidden[first + 1 :, first_token:] from hidden[first]; `ablated` (layer, head) pairs are switched off."""
    for layer in range(first, model.config.n_layer):
        heads = [head for ablated_layer, head in ablated if ablated_layer == layer]
        hidden[layer + 1, first_token:] = model.block(hidden[layer], layer, heads, first_token)


def read_hidden(trace: Trace, stages: Sequence[int], positions: Ints, top: int) -> LogitLens:
    """Compute the predictions at these stages and positions. Memory is bounded: see LOGITS_PER_CHUNK."""
    model, n = trace.model, len(positions)
    S, k = len(stages), min(max(top, 1), model.config.vocab_size)
    integers = {name: np.zeros((S, n), dtype=np.int64) for name in ("final_ranks", "next_ranks")}
    names = ("entropy_bits", "final_logprobs", "next_logprobs", "kl_bits")
    floats = {name: np.zeros((S, n), dtype=np.float32) for name in names}
    top_ids, top_probs = np.zeros((S, n, k), dtype=np.int64), np.zeros((S, n, k), dtype=np.float32)
    final_ids = np.zeros(n, dtype=np.int64)
    next_ids = np.append(trace.ids[1:], 0)[positions]
    rows_per_chunk = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    for start in range(0, n, rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        final = log_softmax(model.logits(trace.hidden[-1, positions[rows]]))
        final_probs = np.exp(final)
        final_ids[rows] = final.argmax(axis=1)
        for s, stage in enumerate(stages):
            is_final = stage == model.config.n_layer
            logprobs = final if is_final else log_softmax(model.logits(trace.hidden[stage, positions[rows]]))
            probs = final_probs if is_final else np.exp(logprobs)
            top_ids[s, rows], top_probs[s, rows] = most_likely(probs, k)
            floats["entropy_bits"][s, rows] = -np.vecdot(probs, logprobs)
            floats["kl_bits"][s, rows] = 0 if is_final else kl_divergence(final_probs, final, logprobs)
            for name, ids in (("final", final_ids[rows]), ("next", next_ids[rows])):
                id_logprobs = np.take_along_axis(logprobs, ids[:, None], axis=1)
                floats[f"{name}_logprobs"][s, rows] = id_logprobs[:, 0]
                integers[f"{name}_ranks"][s, rows] = 1 + np.count_nonzero(logprobs > id_logprobs, axis=1)
    is_last = positions == len(trace.ids) - 1
    floats["next_logprobs"][:, is_last] = np.nan
    integers["next_ranks"][:, is_last] = 0
    nats_per_bit = math.log(2)
    return LogitLens(
        stages=np.array(stages, dtype=np.int64),
        positions=positions,
        top_ids=top_ids,
        top_probs=top_probs,
        entropy_bits=floats["entropy_bits"] / nats_per_bit,
        final_ids=final_ids,
        final_probs=np.exp(floats["final_logprobs"]),
        next_probs=np.exp(floats["next_logprobs"]),
        next_bits=-floats["next_logprobs"] / nats_per_bit,
        kl_bits=floats["kl_bits"] / nats_per_bit,
        **integers,
    )


def log_softmax(logits: Floats) -> Floats:
    """Return the log-probabilities (nats) of each row of logits (n, V); overwrites the logits."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def kl_divergence(probs: Floats, logprobs: Floats, other_logprobs: Floats) -> Floats:
    """Return KL(p || q) in nats for each row of two distributions (n, V)."""
    return np.maximum(np.vecdot(probs, logprobs - other_logprobs), 0)  # rounding may leave -1e-8


def most_likely(probs: Floats, k: int) -> tuple[Ints, Floats]:
    """Return the ids and probabilities (n, k) of the k largest of each row (n, V), in descending order."""
    ids = np.argpartition(-probs, k - 1, axis=1)[:, :k]
    order = np.lexsort((ids, -np.take_along_axis(probs, ids, axis=1)), axis=1)  # of equals, the lowest id first
    ids = np.take_along_axis(ids, order, axis=1)
    return ids, np.take_along_axis(probs, ids, axis=1)


def check_layer(layer: int, config: ModelConfig) -> None:
    """Raise `UserError` unless the model has this layer."""
    if not 0 <= layer < config.n_layer:
        raise UserError(f"layer {layer} does not exist: the model has {config.n_layer}, numbered from 0")
