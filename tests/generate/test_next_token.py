"""The steps of the next token are those of `generate.sampling`, and what `generate` samples from."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tinystories
from tinystories import Storyteller
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.generate.next_token import STEPS, NextToken, analyze_next_token
from tinystories.generate.sampling import UniformStream, compute_probabilities, inverse_cdf_sample

V = 40


@pytest.fixture(scope="module")
def storyteller() -> Storyteller:
    return tinystories.load(engine="cpu")


def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED_MODEL)


def analyze(logits: list[float], seen: list[int] | None = None, **changes: float) -> NextToken:
    mask = np.zeros(len(logits), dtype=np.bool_)
    mask[seen or []] = True
    config = SamplingConfig(**({"temperature": 1.0, "min_p": 0.0} | changes))  # type: ignore[arg-type]
    return analyze_next_token(np.array(logits, dtype=np.float32), config, TOKENIZER, mask)


TOKENIZER = tokenizer()
CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 1e-40, 0.3, 1.0, 7.0]),
    top_k=st.sampled_from([0, 1, 3, V + 2]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)


@settings(max_examples=150)
@given(config=CONFIGS, seed=st.integers(0, 99), spread=st.sampled_from([0.0, 1.0, 30.0]))
@example(config=SamplingConfig(temperature=0.0, repetition_penalty=2.0), seed=0, spread=1.0)
def test_last_step_is_the_definition_bit_for_bit(config: SamplingConfig, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(V) * spread).astype(np.float32)
    seen = rng.random(V) < 0.3
    result = analyze_next_token(logits, config, TOKENIZER, seen)
    (expected,) = compute_probabilities(logits[None], config, seen[None])
    assert (result.final_probs == expected).all()
    assert result.n_kept == np.count_nonzero(expected)
    for token in range(V):
        assert (result.cut_by(token) is None) == (expected[token] > 0)
    # Each filter alone, on the output of the earlier ones: a token stays cut, and the others keep their proportions.
    for before, after in itertools.pairwise(STEPS[1:]):
        kept = result.after[after] > 0
        assert (result.after[before][kept] > 0).all()
        np.testing.assert_allclose(
            result.after[after][kept], (result.after[before] / result.after[before][kept].sum())[kept], rtol=1e-5
        )


def test_each_cut_is_named_by_the_filter_that_made_it() -> None:
    result = analyze([5.0, 4.0, 3.0, 2.0, 1.0, -60.0], top_k=4, top_p=0.96, min_p=0.2)
    assert [result.cut_by(token) for token in range(6)] == [None, None, "min_p", "top_p", "top_k", "temperature"]
    assert [result.cut_by(token) for token in range(2)] == [None, None]
    greedy = analyze([1.0, 2.0, 0.0], temperature=0.0, top_k=1, min_p=1.0)
    assert [greedy.cut_by(token) for token in range(3)] == ["temperature", None, "temperature"]


def test_model_probabilities_know_neither_temperature_nor_penalty() -> None:
    logits = np.array([2.0, 1.0, -1.0])
    result = analyze(logits.tolist(), seen=[0, 2], temperature=0.5, repetition_penalty=2.0)
    softmax = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(result.model_probs, softmax, rtol=1e-6)
    penalized = np.exp([1.0, 1.0, -2.0]) / np.exp([1.0, 1.0, -2.0]).sum()
    np.testing.assert_allclose(result.after["repetition_penalty"], penalized, rtol=1e-6)
    cold = penalized**2 / (penalized**2).sum()
    np.testing.assert_allclose(result.after["temperature"], cold, rtol=1e-5)
    assert result.entropy_bits == pytest.approx(-(softmax * np.log2(softmax)).sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        analyze([0.0, bad])


def test_candidates_are_the_likeliest_and_end(storyteller: Storyteller) -> None:
    result = storyteller.next_token("Once upon a", temperature=0.7, top_k=3)
    candidates = result.candidates(4)
    assert len(candidates) == 5
    assert candidates[0].text == " time"
    assert candidates[-1].text == END
    assert [one.cut_by for one in candidates[1:]].count("top_k") >= 1
    assert [one.model_prob for one in candidates[:4]] == sorted(
        (one.model_prob for one in candidates[:4]), reverse=True
    )
    assert candidates[0].after.keys() == set(STEPS)
    assert json.loads(json.dumps(result.as_dict(4)))["candidates"][0]["text"] == " time"


@pytest.mark.parametrize("prompt", ["", "Lily", "The dog saw the dog and the dog"])
def test_first_token_of_a_story_is_sampled_from_these_probabilities(storyteller: Storyteller, prompt: str) -> None:
    sampling = {"temperature": 1.1, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    result = storyteller.next_token(prompt, **sampling)  # type: ignore[arg-type]
    assert result.settings == dataclasses.replace(storyteller.settings, **sampling)  # type: ignore[arg-type]
    for seed in range(20):
        story = storyteller.generate(prompt, seed=seed, max_tokens=1, **sampling)  # type: ignore[call-overload]
        u = np.array([UniformStream(seed, 0).next()], dtype=np.float32)
        assert story.ids == tuple(inverse_cdf_sample(result.final_probs[None], u).tolist())


def test_settings_default_to_those_of_the_model(storyteller: Storyteller) -> None:
    assert storyteller.next_token("Once").settings == storyteller.settings
    changed = storyteller.next_token("Once", top_k=5, min_p=None)  # type: ignore[arg-type]
    assert changed.settings == dataclasses.replace(storyteller.settings, top_k=5)


def test_unknown_settings_are_refused_and_the_storyteller_is_free_afterwards(storyteller: Storyteller) -> None:
    with pytest.raises(UserError, match="unknown sampling setting max_tokens; use temperature, top_k"):
        storyteller.next_token("Once", max_tokens=3)  # type: ignore[call-arg]
    stream = storyteller.stream("Once", seed=1)
    next(stream)
    with pytest.raises(UserError, match="still open"):
        storyteller.next_token("Once")
    stream.close()
    assert storyteller.next_token("Once" * 600).n_kept > 0, "a prompt longer than the context, as `generate` reads it"


def test_after_a_trace_the_distribution_is_that_of_its_own_logits(storyteller: Storyteller) -> None:
    prompt, sampling = "Once upon a time there was a red ball. The", {"temperature": 0.7, "repetition_penalty": 1.5}
    trace = storyteller.trace(prompt)
    result = storyteller.next_token(trace, **sampling)  # type: ignore[arg-type]
    close_to = storyteller.next_token(prompt, **sampling)  # type: ignore[arg-type]
    logits = trace.logits()[-1].astype(np.float64)
    weights = np.exp(logits - logits.max())
    np.testing.assert_allclose(result.model_probs, weights / weights.sum(), atol=1e-6)
    assert np.abs(result.final_probs - close_to.final_probs).max() < 0.05  # the engine rounds activations
    seen = storyteller.tokenizer.encode(" ball")[0]
    assert result.after["repetition_penalty"][seen] < result.model_probs[seen]  # the ids of the trace are penalized
    assert not np.array_equal(result.final_probs, close_to.final_probs)
