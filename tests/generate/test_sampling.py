import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinystories.config import SamplingConfig
from tinystories.errors import UserError
from tinystories.generate import sampling
from tinystories.generate.sampling import (
    UniformStream,
    apply_repetition_penalty,
    compute_probabilities,
    inverse_cdf_sample,
    sample,
)

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(params=[np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def array(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """float32 as either kind of engine hands it out."""
    return lambda values: request.param(np.asarray(values, dtype=np.float32))


def of(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**(PLAIN | changes))


def mask(history: set[int], logits: Any) -> np.ndarray:
    """The ids of a history, marked in every row."""
    return np.tile(np.isin(np.arange(logits.shape[1]), list(history)), (logits.shape[0], 1))


def log(*p: float) -> list[list[float]]:
    return [[math.log(x) for x in p]]


CLOSED_FORMS = [
    # p of the logits, settings, history, expected
    ((0.5, 0.3, 0.2), {}, set(), (0.5, 0.3, 0.2)),
    ((0.5, 0.3, 0.2), {"temperature": 0.5}, set(), (0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38)),
    ((0.5, 0.3, 0.2), {"temperature": 0.0}, set(), (1, 0, 0)),
    ((0.3, 0.5, 0.2), {"temperature": 1e-45}, set(), (0, 1, 0)),
    ((0.3, 0.5, 0.2), {"top_k": 1}, set(), (0, 1, 0)),
    ((0.1, 0.4, 0.2, 0.3), {"top_k": 2}, set(), (0, 4 / 7, 0, 3 / 7)),
    ((0.5, 0.3, 0.2), {"top_k": 99}, set(), (0.5, 0.3, 0.2)),
    ((0.2, 0.3, 0.5), {"top_p": 0.7}, set(), (0, 3 / 8, 5 / 8)),
    ((0.2, 0.3, 0.5), {"top_p": 0.45}, set(), (0, 0, 1)),
    ((0.2, 0.3, 0.5), {"top_p": 1e-30}, set(), (0, 0, 1)),
    ((0.1, 0.3, 0.6), {"min_p": 0.4}, set(), (0, 1 / 3, 2 / 3)),
    ((0.1, 0.3, 0.6), {"min_p": 1.0}, set(), (0, 0, 1)),
    # Each filter works on what the one before it left: of .4 .3 .2 .1 top_k leaves 4/9 3/9 2/9, top_p 4/7 3/7.
    ((0.1, 0.2, 0.3, 0.4), {"top_k": 3, "top_p": 0.75}, set(), (0, 0, 3 / 7, 4 / 7)),
    ((0.1, 0.2, 0.3, 0.4), {"top_p": 0.95, "min_p": 0.6}, set(), (0, 0, 3 / 7, 4 / 7)),
    # Temperature comes before the filters: at 2 the square roots 1 2 3 4 (of 1 4 9 16) count.
    ((1 / 30, 4 / 30, 9 / 30, 16 / 30), {"temperature": 2.0, "top_p": 0.65}, set(), (0, 0, 3 / 7, 4 / 7)),
    # Ties with the last one kept are kept.
    ((0.25, 0.25, 0.25, 0.25), {"top_k": 2}, set(), (0.25, 0.25, 0.25, 0.25)),
    ((0.4, 0.2, 0.2, 0.2), {"top_p": 0.5}, set(), (0.4, 0.2, 0.2, 0.2)),
    ((0.4, 0.4, 0.2), {"temperature": 0.0}, set(), (1, 0, 0)),
    # The penalty squares a probability below 1 (its logit is negative); so .5 .25 .25 counts as .25 .25 .25.
    ((0.5, 0.25, 0.25), {"repetition_penalty": 2.0}, {0}, (1 / 3, 1 / 3, 1 / 3)),
    ((0.5, 0.3, 0.2), {"repetition_penalty": 2.0, "temperature": 0.0}, {0}, (0, 1, 0)),
    ((0.5, 0.3, 0.2), {"repetition_penalty": 2.0}, set(), (0.5, 0.3, 0.2)),
    ((1.0,), {"top_k": 5, "top_p": 0.1, "min_p": 0.5}, {0}, (1,)),
]


@pytest.mark.parametrize(("p", "changes", "history", "expected"), CLOSED_FORMS)
def test_probabilities_have_their_closed_form(
    array: Callable[[Any], Any], p: Any, changes: Any, history: Any, expected: Any
) -> None:
    logits = array(log(*p))
    got = compute_probabilities(logits, of(**changes), mask(history, logits))
    np.testing.assert_allclose(np.asarray(got), [expected], atol=2e-6)


def reference(z: np.ndarray, settings: SamplingConfig, history: set[int]) -> np.ndarray:
    """The same for one row, token by token, in double precision."""
    z = z.astype(np.float64)
    for i in history:
        z[i] = z[i] / settings.repetition_penalty if z[i] > 0 else z[i] * settings.repetition_penalty
    if settings.temperature == 0:
        return np.eye(len(z))[z.argmax()]
    p = np.exp((z - z.max()) / settings.temperature)
    p /= p.sum()
    if settings.top_k:
        p[p < np.sort(p)[::-1][: settings.top_k][-1]] = 0
        p /= p.sum()
    if settings.top_p < 1:
        mass, kept = 0.0, 0.0
        for value in np.sort(p)[::-1]:
            if mass >= settings.top_p:
                break
            mass, kept = mass + value, value
        p[p < kept] = 0
        p /= p.sum()
    p[p < settings.min_p * p.max()] = 0
    return p / p.sum()


@given(
    # Quarters make ties likely, and keep what is not a tie well apart.
    hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(-20, 20)),
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.sampled_from([0, 1, 2, 5, 100]),
    st.sampled_from([1.0, 0.901, 0.503, 0.013]),
    st.sampled_from([0.0, 0.0517, 1.0]),
    st.sampled_from([1.0, 1.25, 0.8]),
    st.sets(st.integers(0, 29)),
)
def test_any_settings_equal_the_reference_on_both_kinds_of_array(
    quarters: np.ndarray, temperature: float, k: int, p: float, floor: float, penalty: float, history: set[int]
) -> None:
    z = (quarters / 4).astype(np.float32)
    settings = of(temperature=temperature, top_k=k, top_p=p, min_p=floor, repetition_penalty=penalty)
    history = {i for i in history if i < z.shape[1]}
    expected = [reference(row, settings, history) for row in z]
    for logits in (z, torch.from_numpy(z)):
        got = compute_probabilities(logits, settings, mask(history, z))
        assert type(got) is type(logits)
        np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5)


def test_top_p_looks_beyond_its_first_candidates(array: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = array(np.linspace(0, 1, 40)[None])
    expected = np.asarray(compute_probabilities(logits, of(top_p=0.9)))
    assert (expected > 0).sum() > 8
    monkeypatch.setattr(sampling, "TOP_P_CANDIDATES", 8)
    np.testing.assert_allclose(np.asarray(compute_probabilities(logits, of(top_p=0.9))), expected)


def test_minus_infinity_is_never_drawn(array: Callable[[Any], Any]) -> None:
    logits = array([[-np.inf, 1, -np.inf, 1]])
    for settings in (of(), of(top_k=3), of(top_p=0.99), of(min_p=0.1), of(repetition_penalty=1.5)):
        np.testing.assert_allclose(
            np.asarray(compute_probabilities(logits, settings, mask({0}, logits)))[0], [0, 0.5, 0, 0.5], atol=1e-6
        )


@pytest.mark.parametrize("bad", [[np.nan, 0, 1], [0, np.inf, 1], [-np.inf] * 3], ids=["nan", "inf", "nothing"])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_logits_that_are_not_finite_are_an_error(array: Callable[[Any], Any], bad: Any, changes: Any) -> None:
    u = np.zeros(2, dtype=np.float32)
    p = np.asarray(compute_probabilities(array([[0, 1, 2], bad]), of(**changes)))
    assert np.isfinite(p[0]).all()
    assert np.isnan(p[1]).all()
    with pytest.raises(UserError, match="not finite"):
        sample(array([[0, 1, 2], bad]), of(**changes), u)


def test_the_penalty_is_that_of_ctrl(array: Callable[[Any], Any]) -> None:
    seen = np.array([[True, True, True, False], [False, False, False, True]])
    got = apply_repetition_penalty(array([[2.0, -2.0, 0.0, 3.0], [2.0, -2.0, 0.0, 3.0]]), 2.0, seen)
    assert np.asarray(got).tolist() == [[1.0, -4.0, 0.0, 3.0], [2.0, -2.0, 0.0, 1.5]]


def test_draw_inverts_the_cumulative_distribution(array: Callable[[Any], Any]) -> None:
    """Evenly spaced u give each token its share, exactly but for the ends of its interval."""
    p = [0.0, 0.37, 0.0, 0.205, 0.425, 0.0]
    u = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    ids = np.asarray(inverse_cdf_sample(array([p] * 1000), u))
    assert (np.diff(ids) >= 0).all()
    np.testing.assert_allclose(np.bincount(ids, minlength=6), np.multiply(p, 1000), atol=1)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_u_draw_tokens_that_are_possible(array: Callable[[Any], Any], u: float) -> None:
    p = [[0.0, *np.random.default_rng(i).dirichlet(np.ones(999)), 0.0] for i in range(50)]
    ids = np.asarray(inverse_cdf_sample(array(p), np.full(50, u, dtype=np.float32)))
    assert ((ids >= 1) & (ids <= 999)).all()


def test_a_u_that_no_sum_reaches_draws_the_likeliest(array: Callable[[Any], Any]) -> None:
    """As rounding may leave it where a device adds in another order."""
    assert np.asarray(
        inverse_cdf_sample(array([[0.0, 0.3, 0.7, 0.0]]), np.array([1.0], dtype=np.float32))
    ).tolist() == [2]


def test_both_kinds_of_array_draw_the_same() -> None:
    logits = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32) * 2
    u = np.random.default_rng(1).random(300, dtype=np.float32)
    for settings in (of(), of(temperature=0.0), of(top_k=7), of(top_p=0.8), SamplingConfig()):
        assert sample(logits, settings, u) == sample(torch.from_numpy(logits), settings, u)


@given(
    min_p=st.one_of(st.just(0.0), st.floats(1e-45, 1)),
    temperature=st.floats(1e-3, 5),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    penalty=st.sampled_from([1.0, 1.2, 0.8]),
    scale=st.floats(0, 200),
    seed=st.integers(0, 2**32),
)
def test_candidates_alone_draw_the_same(
    min_p: float, temperature: float, top_k: int, top_p: float, penalty: float, scale: float, seed: int
) -> None:
    """Bit for bit: what is left out has weight 0, and sums of the others are exact."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, 50)) * scale + rng.uniform(-50, 50)).astype(np.float32)
    logits[rng.random((3, 50)) < 0.1] = -np.inf
    chosen = of(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    u, seen = rng.random(3, dtype=np.float32), rng.random((3, 50)) < 0.2
    penalized = apply_repetition_penalty(logits, penalty, seen)
    candidates, weights = sampling.find_candidates(penalized, chosen), sampling.compute_weights(penalized, chosen)
    assert candidates is not None
    assert set(np.flatnonzero(weights.any(axis=0))) <= set(candidates)
    assert sample(logits, chosen, u, seen) == inverse_cdf_sample(weights, u).tolist()


def test_weights_are_the_exponential_in_units_of_2_to_the_minus_30() -> None:
    x = np.concatenate([-np.geomspace(1e-9, 30, 100_000), [0.0, -0.0, -100.0, -1e30, -np.inf]]).astype(np.float32)
    weights = sampling.exp(x)
    exact = np.exp(x.astype(np.float64)) * 2**30
    assert weights[x == 0].tolist() == [2**30] * 2
    assert (weights == np.rint(weights)).all()
    assert (np.abs(weights - exact) <= 0.5 + 2e-7 * exact).all()
    assert (weights[-3:] == 0).all()


def test_weights_are_those_of_any_processor() -> None:
    """Only operations that IEEE 754 defines: this sum was computed on an x86-64 processor with AVX-512."""
    x = -np.arange(40_000, dtype=np.float32) / 2048
    assert int(sampling.exp(x).astype(np.int64).sum()) == 2_199_560_162_928


def test_drawn_tokens_follow_the_distribution() -> None:
    """Pearson's chi-square over the randomness that stories really use; 3 degrees of freedom, p = 1e-4 at 21.1."""
    p = np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32)
    for stream in (UniformStream(7, 0), UniformStream(0, 123)):
        u = np.array([stream.next() for _ in range(4000)])
        counts = np.bincount(inverse_cdf_sample(np.tile(p, (4000, 1)), u), minlength=4)
        assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 21.1


def test_randomness_is_a_function_of_seed_story_and_place() -> None:
    def first(seed: int, story: int) -> tuple[float, ...]:
        stream = UniformStream(seed, story)
        return tuple(float(stream.next()) for _ in range(5))

    assert first(3, 4) == first(3, 4)
    stream, rng = UniformStream(3, 4), np.random.default_rng([3, 4])
    assert [stream.next() for _ in range(200)] == [float(rng.random(dtype=np.float32)) for _ in range(200)]
    assert len({first(seed, story) for seed in range(20) for story in range(20)}) == 400
    assert all(0 <= u < 1 and u * 2**24 == int(u * 2**24) for u in first(2**40, 0))
