"""The `Engine` protocol. Sampling, stop conditions, detokenizing, evaluation and the CLI work on any implementation."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.engine.sampling_state import SamplingState
from tinystories.errors import UserError

Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Logits: TypeAlias = Any  # a NumPy array or a torch tensor, fp32, on the engine's device


@runtime_checkable
class Engine(Protocol):
    """A model with `n_slots` independent KV cache slots of at most `config.n_ctx` token ids each.

    The slots are state: one caller of `prefill`, `extend`, `step` and `free` at a time. `logprobs` may be called from
    any thread.
    """

    config: ModelConfig
    n_slots: int

    def prefill(self, slot: int, ids: Ids) -> Logits:
        """Replace the content of a slot by 1..n_ctx ids; return the logits (V,) after the last one."""
        ...

    def extend(self, slot: int, ids: Ids, *, start: int | None = None, all_logits: bool = False) -> Logits:
        """Append 1 or more ids to a slot; return the logits (V,) after the last one.

        With `all_logits`, return those after each (len(ids), V). With `start`, the slot first drops all but its first
        `start` ids; with 0, this is a prefill. The slot must hold at least `start` ids, and at most n_ctx afterwards.
        A context may be split in any way: on the CPU engine the logits are those of one prefill, bit for bit; on torch
        they are equal up to rounding.
        """
        ...

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        """Append one id to each of the (distinct) slots; return the logits (len(slots), V).

        A slot must have been prefilled and hold fewer than n_ctx ids. Later calls do not overwrite the result.
        """
        ...

    def free(self, slot: int) -> None:
        """Clear a slot. Freeing a free slot does nothing."""
        ...

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        """Return, for each sequence of 2..n_ctx+1 ids, the log-probabilities (nats) of ids[i + 1] given ids[: i + 1].

        Does not use any slot. Accepts any number of sequences: the engine batches them in bounded memory.
        """
        ...


@runtime_checkable
class TraceableEngine(Engine, Protocol):
    """An engine whose weights `engine.trace` can compute with."""

    def fp32_weights(self) -> Mapping[str, npt.NDArray[np.float32]]:
        """Return the weights that the engine computes with, in fp32, by their names in `model.safetensors`.

        Quantized ones are dequantized in new memory.
        """
        ...


@runtime_checkable
class SamplingEngine(Engine, Protocol):
    """An engine that also samples: the same ids as `generate.sampling`, bit for bit, but faster."""

    def sample(self, logits: Logits, slots: Sequence[int], u: Sequence[float], state: SamplingState) -> list[int]:
        """Sample the next id of each row of logits (B, V) with the settings of its slot and the number u in [0, 1).

        An id is -1 if the largest logit of its row is not finite. The logits are not changed.
        """
        ...


def validate_ids(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return the ids as an array. Raises `UserError` unless each is in 0..vocab_size-1."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        bad_id = next(int(i) for i in array if not 0 <= i < vocab_size)
        raise UserError(
            f"token id {bad_id} is outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
        )
    return array


def validate_context(ids: Ids, config: ModelConfig) -> npt.NDArray[np.int64]:
    """Return the ids of a prefill as an array. Raises `UserError` unless they are 1..n_ctx ids of the vocabulary."""
    if not 1 <= len(ids) <= config.n_ctx:
        raise UserError(f"{len(ids)} token ids do not fit: the model takes 1 to {config.n_ctx} (model.n_ctx)")
    return validate_ids(ids, config.vocab_size)


def validate_extension(
    slot: int, ids: Ids, start: int | None, lengths: Sequence[int], config: ModelConfig
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the ids of `extend` as an array, and the position of the first one. `lengths` holds that of every slot.

    Raises `UserError` for an id or a slot that does not exist, and unless 1 or more ids fit; asserts that the slot
    holds the ids before `start`.
    """
    validate_slot(slot, len(lengths))
    first = lengths[slot] if start is None else start
    assert 0 <= first <= lengths[slot], "a slot must hold the ids that it is to keep"
    if not 1 <= len(ids) <= config.n_ctx - first:
        raise UserError(
            f"{len(ids)} token ids do not fit after {first} others: a slot holds at most {config.n_ctx} (model.n_ctx)"
        )
    return validate_ids(ids, config.vocab_size), first


def validate_sequences(sequences: Sequence[Ids], config: ModelConfig) -> list[npt.NDArray[np.int64]]:
    """Return the sequences to score as arrays.

    Raises `UserError` unless each has 2..n_ctx+1 ids, all in the vocabulary.
    """
    for ids in sequences:
        if not 2 <= len(ids) <= config.n_ctx + 1:
            raise UserError(
                f"a sequence of {len(ids)} token ids cannot be scored: it needs 2 to {config.n_ctx + 1}"
                " (model.n_ctx + 1); score longer ones with a sliding window"
            )
    return [validate_ids(ids, config.vocab_size) for ids in sequences]


def validate_slot(slot: int, n_slots: int) -> None:
    """Raise `UserError` unless the engine has this slot."""
    if not 0 <= slot < n_slots:
        raise UserError(f"slot {slot} does not exist: the engine has {n_slots} slot(s), numbered from 0")


def validate_step(slots: Sequence[int], ids: Ids, lengths: Sequence[int], config: ModelConfig) -> npt.NDArray[np.int64]:
    """Return the ids of a step, one per slot, as an array. `lengths` holds the current length of every slot.

    Raises `UserError` for an id or a slot that does not exist; asserts that the slots are distinct, prefilled and not
    full.
    """
    array = validate_ids(ids, config.vocab_size)
    assert len(set(slots)) == len(slots) == len(array), "expected distinct slots and one id for each"
    for slot in slots:
        validate_slot(slot, len(lengths))
        assert 0 < lengths[slot] < config.n_ctx, "a slot must be prefilled and not full"
    return array
