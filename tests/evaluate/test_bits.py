import itertools
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from tinystories.config import ModelConfig
from tinystories.data.dataset import open_split
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Ids
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.evaluate import bits
from tinystories.evaluate.bits import bootstrap_interval, encode_stories, evaluate_bits_per_byte, read_prepared_stories
from tinystories.model import GPT


class Uniform:
    """Every token is equally likely, or as likely as `logprob` says."""

    n_slots = 1

    def __init__(self, vocab_size: int, logprob: float | None = None, n_ctx: int = 16) -> None:
        self.config = ModelConfig(vocab_size=vocab_size, n_ctx=n_ctx)
        self.logprob = -math.log(vocab_size) if logprob is None else logprob

    def unused(self, *_: object) -> NoReturn:
        raise AssertionError("evaluation needs no slots")

    prefill = step = free = unused

    def logprobs(self, sequences: Sequence[Ids]) -> list[np.ndarray]:
        assert all(2 <= len(ids) <= self.config.n_ctx + 1 for ids in sequences)
        return [np.full(len(ids) - 1, self.logprob, dtype=np.float32) for ids in sequences]


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Tokenizer:
    return Tokenizer.load(sample_data)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> TorchEngine:
    """A context shorter than most stories."""
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(vocab_size=tokenizer.vocab_size, n_ctx=64, n_layer=1, n_head=2, n_embd=16, n_ff=16, tied=False)
    )
    torch.nn.init.normal_(model.lm_head.weight)
    return TorchEngine(model, device="cpu")


def texts_of(folder: Path, tokenizer: Tokenizer, split: str) -> list[str]:
    tokens, index = open_split(folder, split)
    starts = index[:, 0].astype(int)
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


def test_bits_per_byte_follow_the_protocol_token_by_token(
    engine: TorchEngine, tokenizer: Tokenizer, sample_data: Path
) -> None:
    """One story at a time, one window at a time, token by token."""
    texts = [*texts_of(sample_data, tokenizer, "val")[:2], "a", "The cat sat 🐈."]
    n_ctx, nats, tokens, n_bytes, longest = engine.config.n_ctx, 0.0, 0, 0, 0
    for text in texts:
        ids = [tokenizer.end_id, *tokenizer.encode(text), tokenizer.end_id]
        for target in range(1, len(ids)):
            # The window that scores it is the first one, or the earliest that reaches it in steps of half a context.
            steps = max(0, -(-(target - n_ctx) // (n_ctx // 2)))
            start = steps * (n_ctx // 2)
            with torch.no_grad():
                z = engine.model.logits(engine.model(torch.tensor([ids[start:target]]))[0, -1])
            nats -= z.log_softmax(-1)[ids[target]].item()
        tokens += len(ids) - 1
        n_bytes += len(text.encode())
        longest = max(longest, len(ids))
    assert longest > 2 * n_ctx, "some story must need several windows"
    report = evaluate_bits_per_byte(engine, encode_stories(texts, tokenizer))
    assert report.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert report.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
    assert (report.tokens, report.bytes, report.stories) == (tokens, n_bytes, len(texts))
    assert report.interval[0] < report.bits_per_byte < report.interval[1]
    assert report.seconds > 0


def test_texts_and_prepared_data_score_the_same(engine: TorchEngine, tokenizer: Tokenizer, sample_data: Path) -> None:
    tokens, index = open_split(sample_data, "val")
    a = evaluate_bits_per_byte(engine, read_prepared_stories(tokens, index))
    b = evaluate_bits_per_byte(engine, encode_stories(texts_of(sample_data, tokenizer, "val"), tokenizer))
    assert a.bits_per_byte == pytest.approx(b.bits_per_byte, rel=1e-9)
    assert (a.tokens, a.bytes, a.stories) == (b.tokens, b.bytes, b.stories)
    assert a.bytes == int(index[-1, 1])


def test_a_model_that_knows_nothing_needs_log_v_bits_a_token(tokenizer: Tokenizer) -> None:
    texts = ["a", "One cat.", "A story that is longer than the context of sixteen tokens: " * 3]
    report = evaluate_bits_per_byte(Uniform(512), encode_stories(texts, tokenizer))
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert report.tokens == n_tokens
    assert report.bits_per_byte == pytest.approx(9 * n_tokens / report.bytes)
    assert report.nats_per_token == pytest.approx(math.log(512))


def test_bytes_are_those_of_utf_8(tokenizer: Tokenizer) -> None:
    assert evaluate_bits_per_byte(Uniform(512), encode_stories(["naïve 🐈"], tokenizer)).bytes == 11


def test_a_subset_is_fixed_and_spread_over_the_split() -> None:
    index = np.stack([np.arange(0, 110, 10), np.arange(0, 1100, 100)], axis=1).astype(np.uint64)
    tokens = np.arange(101, dtype=np.uint16)
    chosen = [int(ids[0]) // 10 for ids, _ in read_prepared_stories(tokens, index, limit=4)]
    assert chosen == [0, 2, 5, 7]
    assert [(list(ids), n) for ids, n in read_prepared_stories(tokens, index, limit=1)] == [(list(range(11)), 100)]
    for limit in (0, 10, 99):
        assert len(list(read_prepared_stories(tokens, index, limit=limit))) == 10


def test_nothing_to_evaluate_is_refused(tokenizer: Tokenizer) -> None:
    for texts in ([], [""]):
        with pytest.raises(UserError, match="no stories"):
            evaluate_bits_per_byte(Uniform(512), encode_stories(texts, tokenizer))
    with pytest.raises(UserError, match="no stories"):
        evaluate_bits_per_byte(
            Uniform(512), read_prepared_stories(np.zeros(1, dtype=np.uint16), np.zeros((1, 2), dtype=np.uint64))
        )


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_probabilities_that_are_not_finite_are_refused(tokenizer: Tokenizer, logprob: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        evaluate_bits_per_byte(Uniform(512, logprob), encode_stories(["a"], tokenizer))


def test_memory_does_not_grow_with_the_number_of_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "BATCH_STORIES", 8)
    monkeypatch.setattr(bits, "BOOTSTRAP_RESAMPLES", 2)
    told: list[int] = []
    alive: list[int] = []

    def stories(n: int) -> Iterator[tuple[Ids, int]]:
        for i in range(n):
            if i == n - 1:
                alive.append(tracemalloc.get_traced_memory()[0])
            yield np.zeros(1000, dtype=np.int64), 100

    tracemalloc.start()
    for n in (20, 200):
        evaluate_bits_per_byte(Uniform(512, n_ctx=1000), stories(n), told.append)
    tracemalloc.stop()
    assert told[:3] == [8, 16, 20]
    assert told[-1] == 200
    assert alive[1] - alive[0] < 8 * 1000 * 8, "memory grows with the number of stories"


def test_the_interval_narrows_as_stories_are_added_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(500, 1000, 1000)
    story_bits = n_bytes * rng.normal(1.0, 0.1, 1000)
    low, high = bootstrap_interval(story_bits, n_bytes)
    assert bootstrap_interval(story_bits, n_bytes) == (low, high)
    # The ratio of one story has a standard deviation of 0.1, the mean of 1,000 that over the root of 1,000.
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(1000), rel=0.15)
    few = bootstrap_interval(story_bits[:100], n_bytes[:100])
    assert (few[1] - few[0]) / (high - low) == pytest.approx(math.sqrt(10), rel=0.3)


def test_the_interval_of_equal_stories_is_a_point() -> None:
    low, high = bootstrap_interval(np.full(10, 50.0), np.full(10, 100))
    assert (low, high) == (0.5, 0.5)
