"""What every engine answers. Sampling, stop rules, text, evaluation and commands are written once, on top of this."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.errors import UserError

Ids: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Logits: TypeAlias = Any  # an array of the engine's own kind (NumPy or torch), fp32, on the engine's device


@runtime_checkable
class Engine(Protocol):
    """A model with `n_slots` independent contexts ("slots") of at most `config.n_ctx` ids each.

    The engine is stateful and answers one caller at a time.
    """

    config: ModelConfig
    n_slots: int

    def prefill(self, slot: int, ids: Ids) -> Logits:
        """Logits (V,) after the last of 1..n_ctx ids, which become the whole content of the slot."""
        ...

    def step(self, slots: Sequence[int], ids: Ids) -> Logits:
        """Append one id to each of the given (different) slots; logits (len(slots), V).

        A slot must have been prefilled and hold fewer than n_ctx ids. The caller may keep the result.
        """
        ...

    def free(self, slot: int) -> None:
        """Forget a slot's content. Freeing a free slot does nothing."""
        ...

    def logprobs(self, sequences: Sequence[Ids]) -> list[npt.NDArray[np.floating[Any]]]:
        """For each sequence of 2..n_ctx+1 ids the natural-log probability of ids[i + 1] given ids[: i + 1].

        Needs no slot. Any number of sequences: the engine batches them, in bounded memory.
        """
        ...


def validate_ids(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    """The ids as an array; `UserError` unless each is in 0..vocab_size-1."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        bad_id = next(int(i) for i in array if not 0 <= i < vocab_size)
        raise UserError(
            f"token id {bad_id} is outside the model's vocabulary of {vocab_size}; use the tokenizer of the model"
        )
    return array


def validate_context(ids: Ids, config: ModelConfig) -> npt.NDArray[np.int64]:
    """As `checked_ids`, for the 1..n_ctx ids of a prefill."""
    if not 1 <= len(ids) <= config.n_ctx:
        raise UserError(f"{len(ids)} token ids do not fit: the model takes 1 to {config.n_ctx} (model.n_ctx)")
    return validate_ids(ids, config.vocab_size)


def validate_sequences(sequences: Sequence[Ids], config: ModelConfig) -> list[npt.NDArray[np.int64]]:
    """As `checked_ids`, for the sequences of 2..n_ctx+1 ids whose log-probabilities are wanted."""
    for ids in sequences:
        if not 2 <= len(ids) <= config.n_ctx + 1:
            raise UserError(
                f"a sequence of {len(ids)} token ids cannot be scored: it needs 2 to {config.n_ctx + 1}"
                " (model.n_ctx + 1); score longer ones by windows"
            )
    return [validate_ids(ids, config.vocab_size) for ids in sequences]


def validate_slot(slot: int, n_slots: int) -> None:
    if not 0 <= slot < n_slots:
        raise UserError(f"slot {slot} does not exist: the engine has {n_slots}, counted from 0")


def validate_step(slots: Sequence[int], ids: Ids, lengths: Sequence[int], config: ModelConfig) -> npt.NDArray[np.int64]:
    """As `checked_ids`, for one id more in each of several slots, of which an engine has len(lengths)."""
    array = validate_ids(ids, config.vocab_size)
    assert len(set(slots)) == len(slots) == len(array), "one id for each of different slots"
    for slot in slots:
        validate_slot(slot, len(lengths))
        assert 0 < lengths[slot] < config.n_ctx, "a slot must be prefilled and have room"
    return array
