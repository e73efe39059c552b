"""The compiled sampler returns the ids of the definition in generate/sampling.py, bit for bit."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import fp32

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config import SamplingConfig
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.cpu.sampler import Sampler
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.protocol import SamplingEngine
from tinystories.engine.sampling_state import SamplingState
from tinystories.generate.batching import Request, generate_all
from tinystories.generate.sampling import exp, sample
from tinystories.generate.storyteller import Storyteller

PLAIN = SamplingConfig(temperature=1.0, min_p=0.0)
U = (0.0, 0.5, 1 - 2**-24)


def random_logits(rng: np.random.Generator, vocab_size: int) -> np.ndarray:
    """A row of logits like those of a model, or of a kind that is hard for a sampler."""
    kind = rng.integers(8)
    z = rng.standard_normal(vocab_size) * rng.choice([0.01, 1, 3, 30]) + rng.choice([0, -5, 40])
    z[rng.integers(vocab_size, size=1 + vocab_size // 200)] += rng.exponential(4)  # a few likely ids
    if kind == 0:
        z = np.round(z * 2) / 2  # ties
    elif kind == 1:
        z[:] = rng.choice([0.0, -3.25, 1e30])
    elif kind == 2:
        z[rng.random(vocab_size) < rng.choice([0.5, 0.99])] = -np.inf
        z[rng.integers(vocab_size)] = 1.5
    elif kind == 3:
        z *= rng.choice([1e-20, 1e-6, 1e4, 1e30])
    elif kind == 4:
        z = np.abs(z) * rng.choice([-1, 1]) * rng.choice([0.0, 1.0])  # one sign, or zeros of one sign
    return z.astype(np.float32)


def random_settings(rng: np.random.Generator, vocab_size: int) -> SamplingConfig:
    top_k = rng.choice([0, 0, 1, 2, 40, vocab_size - 1, vocab_size, vocab_size + 1])
    return SamplingConfig(
        temperature=float(rng.choice([0, 1e-45, 1e-3, 0.8, 0.8, 1, 1.7, 50, 1e38])),
        top_k=max(0, int(top_k)),
        top_p=float(rng.choice([1, 1, 1, 0.9, 0.5, 0.999999, 1e-30, rng.uniform(0.01, 1)])),
        min_p=float(rng.choice([0, 0.05, 0.05, 0.3, 1e-6, 1e-45, 1, rng.uniform(0, 1)])),
        repetition_penalty=float(rng.choice([1, 1.2, 1.2, 0.7, 2, rng.uniform(0.5, 2)])),
    )


@pytest.mark.parametrize(
    ("vocab_size", "n_batches"), [(1, 20), (2, 40), (61, 60), (64, 60), (700, 60), (4096, 60), (50_257, 4)]
)
def test_ids_are_those_of_the_definition(vocab_size: int, n_batches: int) -> None:
    rng = np.random.default_rng(vocab_size)
    sampler, n_slots = Sampler(40, vocab_size), 40
    for _ in range(n_batches):
        state = SamplingState(n_slots, vocab_size)
        for slot in range(n_slots):
            seen = rng.integers(vocab_size, size=rng.choice([0, 1, 150])).tolist()
            state.begin(slot, random_settings(rng, vocab_size), seen)
        slots = rng.permutation(n_slots)[: rng.integers(1, n_slots + 1)].tolist()
        logits = np.stack([random_logits(rng, vocab_size) for _ in slots])
        before = logits.copy()
        u = np.where(rng.random(len(slots)) < 0.1, rng.choice(U), rng.random(len(slots), dtype=np.float32))
        ids = sampler.sample(logits, slots, u, state)
        assert (logits == before).all()
        for row, slot in enumerate(slots):
            z, settings, number = logits[row : row + 1], state.settings[slot], u[row : row + 1]
            with np.errstate(over="ignore"):  # extreme logits, divided by a tiny temperature, are -inf
                expected = sample(z, settings, number, state.seen_mask([slot]))
            assert [ids[row]] == expected, (settings, number)


def test_a_weight_that_equals_the_bound_of_min_p_is_kept() -> None:
    """Also where the setting is a little above it, since the bound is fp32."""
    rng = np.random.default_rng(3)
    logits = rng.uniform(-3, 0, (64, 40)).astype(np.float32)
    logits[:, 0] = 0
    shares = np.sort(exp(logits), axis=1)[:, 20].astype(np.float64) / 2**30
    state, last = SamplingState(64, 40), np.argsort(logits, axis=1)[:, 20]
    for slot, share in enumerate(shares):
        state.begin(slot, SamplingConfig(temperature=1.0, min_p=share * (1 + rng.uniform(-3e-8, 3e-8))), [])
    compiled = Sampler(64, 40)
    reached = [set[int]() for _ in range(64)]
    for u in np.arange(64, dtype=np.float32) / 64:
        ids = compiled.sample(logits, range(64), [float(u)] * 64, state)
        expected = [sample(logits[i : i + 1], state.settings[i], u[None])[0] for i in range(64)]
        assert ids == expected
        for i, token in enumerate(ids):
            reached[i].add(token)
    assert sum(last[i] in reached[i] for i in range(64)) > 32


def test_one_row_is_sampled_at_many_numbers() -> None:
    """Every id of a row is reached, and the boundaries between ids are the same."""
    rng = np.random.default_rng(0)
    for settings in (PLAIN, SamplingConfig(), SamplingConfig(min_p=0.0, top_p=0.9), SamplingConfig(top_k=5)):
        logits = np.tile(rng.standard_normal(50).astype(np.float32), (4096, 1))
        state = SamplingState(4096, 50)
        for slot in range(4096):
            state.begin(slot, settings, [])
        u = (np.arange(4096) / 4096).astype(np.float32)
        ids = Sampler(4096, 50).sample(logits, range(4096), u, state)
        assert ids == sample(logits, settings, u)
        assert (np.diff(ids) >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_minus_one(bad: float, temperature: float) -> None:
    logits = np.zeros((3, 100), dtype=np.float32)
    logits[1] = bad if bad == -np.inf else 0
    logits[1, 70] = bad
    state = SamplingState(3, 100)
    for slot in range(3):
        state.begin(slot, dataclasses.replace(PLAIN, temperature=temperature), [])
    ids = Sampler(3, 100).sample(logits, [0, 1, 2], [0.0] * 3, state)
    assert ids == [0, -1, 0]


def test_the_cpu_engine_samples_and_a_slot_that_does_not_exist_is_refused(build: Callable[..., Any]) -> None:
    engine = fp32(build(), n_slots=2)
    assert isinstance(engine, CpuEngine)
    assert isinstance(engine, SamplingEngine)
    state = SamplingState(2, engine.config.vocab_size)
    logits = np.zeros((1, engine.config.vocab_size), dtype=np.float32)
    for slot in (-1, 2):
        with pytest.raises(AssertionError, match="slot"):
            engine.sample(logits, [slot], [0.0], state)


def test_stories_are_those_of_the_definition() -> None:
    """Several at once, with settings of their own; slots are used again."""
    storyteller = Storyteller.load(BUNDLED_MODEL, EngineConfig(engine="cpu", n_slots=3, threads=1))
    engine = storyteller.engine
    plain = SimpleNamespace(
        config=engine.config, n_slots=3, prefill=engine.prefill, step=engine.step, free=engine.free
    )  # without `sample`
    kinds = storyteller.settings, SamplingConfig(temperature=0.0), SamplingConfig(top_k=20, top_p=0.9, min_p=0.0)
    requests = [
        Request(prompt="Once", settings=kinds[i % 3], max_tokens=20 + i, seed=i, ignore_end=True) for i in range(7)
    ]
    compiled, defined = (generate_all(each, storyteller.tokenizer, requests) for each in (engine, plain))
    assert [story.ids for story in compiled] == [story.ids for story in defined]
    assert [story.text for story in compiled] == [story.text for story in defined]
