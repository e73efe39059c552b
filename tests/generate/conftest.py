"""Engines without a network, whose next token is known, and a tokenizer of a few hundred ids."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tinystories.config import ModelConfig
from tinystories.data.build_tokenizer import build_from_spec
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Ids

TEXT = "Once upon a time there was a cat. The cat sat on a mat and was happy. “Hello”, said the 🐈 to the naïve dog."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_from_spec("bpe:300", lambda: [TEXT] * 3)


class FakeEngine:
    """Logits that depend on everything in a slot and on nothing else; `rule` makes them from the slot's ids.

    Holds callers to the protocol, and counts the positions they make it compute.
    """

    def __init__(
        self, rule: Callable[[list[int]], np.ndarray], vocab_size: int, *, n_ctx: int = 16, n_slots: int = 1
    ) -> None:
        self.config = ModelConfig(vocab_size=vocab_size, n_ctx=n_ctx)
        self.n_slots = n_slots
        self.rule = rule
        self.content: dict[int, list[int]] = {}
        self.positions = 0
        self.steps: list[int] = []  # how many slots each step took

    def prefill(self, slot: int, ids: Ids) -> np.ndarray:
        assert 0 <= slot < self.n_slots
        assert 1 <= len(ids) <= self.config.n_ctx
        self.content[slot] = list(map(int, ids))
        self.positions += len(ids)
        return self.rule(self.content[slot])

    def step(self, slots: Sequence[int], ids: Ids) -> np.ndarray:
        assert len(set(slots)) == len(slots) == len(ids) > 0
        for slot, i in zip(slots, ids, strict=True):
            assert len(self.content[slot]) < self.config.n_ctx
            self.content[slot].append(int(i))
        self.positions += len(ids)
        self.steps.append(len(ids))
        return np.stack([self.rule(self.content[slot]) for slot in slots])

    def free(self, slot: int) -> None:
        self.content.pop(slot, None)

    def logprobs(self, sequences: Sequence[Ids]) -> list[np.ndarray]:
        results = []
        for ids in sequences:
            z = np.stack([self.rule(list(map(int, ids[: i + 1]))) for i in range(len(ids) - 1)]).astype(np.float64)
            z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
            results.append(z[range(len(ids) - 1), np.asarray(ids)[1:]])
        return results


@pytest.fixture(scope="session")
def chaotic(tokenizer: Tokenizer) -> Callable[..., FakeEngine]:
    """Random logits, other ones for every content of a slot; END is as likely as `end` says."""

    def make(end: float = 1.0, **sizes: int) -> FakeEngine:
        def rule(ids: list[int]) -> np.ndarray:
            logits = np.random.default_rng(ids).normal(size=tokenizer.vocab_size).astype(np.float32)
            logits[tokenizer.end_id] = np.log(max(end, 1e-30) * tokenizer.vocab_size)
            return logits

        return FakeEngine(rule, tokenizer.vocab_size, **sizes)

    return make


@pytest.fixture(scope="session")
def scripted(tokenizer: Tokenizer) -> Callable[..., FakeEngine]:
    """Says the ids of one script one after the other, whatever it reads; then END for ever."""

    def make(script: Sequence[int], n_ids: int = tokenizer.vocab_size, **sizes: int) -> FakeEngine:
        coming = iter(script)

        def rule(_: list[int]) -> np.ndarray:
            logits = np.full(n_ids, -np.inf, dtype=np.float32)
            logits[next(coming, tokenizer.end_id)] = 0
            return logits

        return FakeEngine(rule, n_ids, **sizes)

    return make
