"""The page's random numbers are NumPy's, and its samples those of generate.sampling, bit for bit."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from page_helpers import needs_node, run_script

from tinystories.config import SamplingConfig
from tinystories.engine.sampling_state import SamplingState
from tinystories.generate.sampling import UniformStream, exp, sample_unchecked

pytestmark = needs_node

UNIFORMS = """
function answer(streams) {
  return streams.map(({ seed, story, n }) => {
    const uniforms = new UniformStream(seed, story);
    return Array.from({ length: n }, () => uniforms.next());
  });
}
"""
SAMPLES = """
function answer(rows) {
  return rows.map(({ logits, settings, u, seen }) => {
    const flags = new Uint8Array(logits.length);
    for (const id of seen) flags[id] = 1;
    return sampleToken(Float32Array.from(logits, Number), settings, u, flags);
  });
}
"""
WEIGHTS = """
const answer = (numbers) => numbers.map((x) => (x < NO_WEIGHT ? 0 : weightOf(x)));
"""
SEEN = """
function answer({ ids, window, spared, size }) {
  const seen = new SeenIds(size, window, (id) => spared.includes(id));
  return ids.map((id) => { seen.add(id); return Array.from(seen.flags); });
}
"""


def test_uniform_numbers_are_numpys() -> None:
    """Seeds of one to five words of 32 bits, and beyond the 4 words of NumPy's pool; stories; odd and even draws."""
    rng = np.random.default_rng(0)
    seeds = [0, 1, 12, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**64 - 1, 2**64, 2**96 + 5, 2**128, 10**50]
    seeds += rng.integers(0, 2**32, 400).tolist()
    streams = [{"seed": str(seed), "story": i % 3, "n": 3 + i % 2} for i, seed in enumerate(seeds)]
    streams += [{"seed": "7", "story": 0, "n": 2000}]
    for stream, numbers in zip(streams, run_script(UNIFORMS, streams), strict=True):
        expected = UniformStream(int(str(stream["seed"])), int(str(stream["story"])))
        assert numbers == [expected.next() for _ in numbers], stream


def random_rows(n: int) -> list[dict[str, Any]]:
    """Rows of logits of every kind, with settings of every kind."""
    rng = np.random.default_rng(1)
    options = {
        "temperature": (0.0, 1e-40, 0.3, 0.8, 1.0, 1.7, 1e35),
        "top_k": (0, 1, 3, 40, 1000),
        "top_p": (1.0, 0.999, 0.9, 0.5, 0.001),
        "min_p": (0.0, 0.001, 0.05, 0.3, 1.0),
        "repetition_penalty": (1.0, 1.2, 0.7),
    }
    rows = []
    for i in range(n):
        size = int(rng.choice([1, 2, 61, 400]))
        scale = float(rng.choice([0.01, 1, 5, 40]))
        logits = (rng.standard_normal(size) * scale + rng.normal() * 10).astype(np.float32)
        if i % 4 == 1:
            logits = np.round(logits)  # ties
        if i % 10 == 2:
            logits[rng.random(size) < 0.3] = -np.inf
        if i % 50 == 3:
            logits[rng.integers(size)] = rng.choice([np.nan, np.inf])
        settings = {name: values[rng.integers(len(values))] for name, values in options.items()}
        u = np.float32(rng.choice([0.0, 1 - 2.0**-24, rng.integers(2**24) / 2**24]))
        seen = np.flatnonzero(rng.random(size) < 0.2).tolist()
        rows.append({"logits": logits, "settings": settings, "u": float(u), "seen": seen})
    return rows + exact_rows()


def exact_rows() -> list[dict[str, Any]]:
    """Rows that are decided by equality: a sum that is just top-p of all, and a number that falls between tokens."""
    rng = np.random.default_rng(7)
    plain = {"temperature": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    rows = []
    for _ in range(40):
        logits = np.sort(rng.standard_normal(50).astype(np.float32))[::-1]
        weights = exp(logits - logits[0]).astype(np.float64)
        top_p = float(weights[:20].sum() / weights.sum())
        rows.append({"logits": logits, "settings": plain | {"top_p": top_p}, "u": 1 - 2.0**-24, "seen": []})
    for n in range(8):
        settings = plain | {"top_p": 1.0}
        rows.append({"logits": np.zeros(8, np.float32), "settings": settings, "u": n / 8, "seen": []})
    return rows


def test_samples_are_those_of_the_definition() -> None:
    rows = random_rows(6000)
    data = [row | {"logits": [str(x).replace("inf", "Infinity") for x in row["logits"].tolist()]} for row in rows]
    for row, token in zip(rows, run_script(SAMPLES, data), strict=True):
        seen = np.zeros((1, len(row["logits"])), np.bool_)
        seen[0, row["seen"]] = True
        settings = SamplingConfig(**row["settings"])
        with np.errstate(invalid="ignore", over="ignore"):
            expected = sample_unchecked(row["logits"][None], settings, np.array([row["u"]], np.float32), seen)
        assert [token] == expected, row


def test_weights_are_rounded_as_in_the_definition() -> None:
    numbers = -np.abs(np.random.default_rng(2).standard_normal(20000) * 12).astype(np.float32)
    assert run_script(WEIGHTS, numbers.tolist()) == exp(numbers).tolist()


def test_the_penalty_looks_back_as_far_and_spares_the_same_ids() -> None:
    ids = np.random.default_rng(4).integers(0, 12, 90).tolist()
    for window, spared in itertools.product((0, 1, 5, 30), ([], [2, 3])):
        settings = dataclasses.replace(
            SamplingConfig(), repetition_penalty=1.2, repetition_window=window, penalize_names=not spared
        )
        state = SamplingState(1, 12)
        seen = state.begin(0, settings, [], frozenset(spared))
        assert seen is not None
        data = {"ids": ids, "window": window, "spared": spared, "size": 12}
        for token, flags in zip(ids, run_script(SEEN, data), strict=True):
            seen.add(token)
            assert flags == state.seen_mask([0])[0].tolist()
