"""Sampling of the next token: the definition that all engines follow, run on the device that holds the logits.

Written against the array API standard, so that the same code works on NumPy arrays and on torch tensors on any device
(rationale: docs/decisions/0003-sampling.md). On NumPy arrays every rounding is defined, so equal logits give equal ids
on every processor. The CPU engine samples by compiled code (engine/cpu/kernels/sampling.py), which returns the same
ids, bit for bit.

Shapes: B is the number of rows in the batch, V the vocabulary size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import SamplingConfig
from tinystories.engine.cpu.kernels.layout import LOGIT_MARGIN
from tinystories.engine.protocol import Engine, Logits, SamplingEngine
from tinystories.engine.sampling_state import SamplingState, clamp_temperature, logit_gap
from tinystories.errors import UserError

# top_p tries this many of the largest probabilities before it sorts the whole vocabulary.
TOP_P_CANDIDATES = 1024
Mask = npt.NDArray[np.bool_]


def array_namespace(array: Logits) -> Any:
    """Return the array API namespace of an array.

    NumPy implements the standard itself since 2.1. Only torch needs array_api_compat, which takes 0.1 s to import.
    """
    if isinstance(array, np.ndarray):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(array)


def exp(x: Logits) -> Logits:
    """Return weights proportional to e^x for x <= 0; for a NumPy array 2^30 e^x, rounded to integers (as fp32).

    Sums of integers are exact in any order, but NumPy's own exp rounds differently from processor to processor. This is
    the polynomial of Cephes' expf, with a relative error below 2e-7, in operations whose results IEEE 754 defines.
    Tensors of other libraries use the exp and the sums of their device.
    """
    if not isinstance(x, np.ndarray):
        return array_namespace(x).exp(x)
    # e^x = 2^n e^r with n = round(x / ln 2). ln 2 is subtracted in two parts, so that r keeps its low bits.
    x = np.maximum(x, np.float32(-30))  # 2^30 e^-30 is rounded to 0
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = r * np.float32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
        y += np.float32(coefficient)
        y *= r
    y = (y + np.float32(5.0000001201e-1)) * r * r + r + np.float32(1)
    # 2^(n + 30) from its bits: a biased exponent and an empty mantissa.
    y *= ((n.astype(np.int32) + np.int32(157)) << np.int32(23)).view(np.float32)
    return np.rint(y, out=y)


def cumulative_sum(weights: Logits) -> Logits:
    """Return the cumulative sums of each row (B, V); exact for NumPy's integer weights."""
    if isinstance(weights, np.ndarray):
        return np.cumulative_sum(weights, axis=-1, dtype=np.float64)
    return array_namespace(weights).cumulative_sum(weights, axis=-1)


def compute_probabilities(logits: Logits, settings: SamplingConfig, seen: Mask | None = None) -> Logits:
    """Return the distribution (B, V) that the next token of each row is sampled from.

    fp32; each row sums to 1, or is NaN if its logits are not finite. Logits of -inf are allowed: these tokens have
    probability 0.

    Applied in this order: the repetition penalty on the ids in `seen` (B, V), temperature, top_k, top_p, min_p. Each
    filter works on the output of the previous one. Tokens that tie with the last one kept are also kept, so that the
    result does not depend on sort order.
    """
    xp = array_namespace(logits)
    weights = compute_weights(apply_repetition_penalty(logits, settings.repetition_penalty, seen), settings)
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def compute_weights(logits: Logits, settings: SamplingConfig) -> Logits:
    """Return the unnormalized probabilities (B, V) after temperature and filters; see `exp`."""
    xp = array_namespace(logits)
    top = xp.max(logits, axis=-1, keepdims=True)  # subtracted before exp, for numerical stability
    valid = xp.isfinite(top)
    z, top = xp.where(valid, logits, xp.zeros_like(logits)), xp.where(valid, top, xp.zeros_like(top))
    if settings.temperature == 0:
        ids = xp.arange(z.shape[-1], device=z.device)
        p = xp.astype(ids == xp.argmax(z, axis=-1, keepdims=True), xp.float32)
    else:
        p = apply_filters(exp((z - top) / clamp_temperature(settings.temperature)), settings)
    return xp.where(valid, p, xp.full_like(top, float("nan")))


def apply_repetition_penalty(logits: Logits, penalty: float, seen: Mask | None) -> Logits:
    """Divide positive logits of the ids in `seen` (B, V) by the penalty, multiply negative ones.

    As in CTRL (arXiv 1909.05858).
    """
    if penalty == 1 or seen is None or not seen.any():
        return logits
    xp, penalty = array_namespace(logits), float(penalty)  # with a float64 of NumPy the result would be float64
    penalized = xp.where(logits > 0, logits / penalty, logits * penalty)
    return xp.where(xp.asarray(seen, device=logits.device), penalized, logits)


def apply_filters(p: Logits, settings: SamplingConfig) -> Logits:
    """Set the unnormalized probabilities (B, V) that top_k, top_p or min_p reject to 0."""
    xp = array_namespace(p)
    if 0 < settings.top_k < p.shape[-1]:
        p = keep_at_least(p, top_values(p, settings.top_k)[:, -1:])
    if settings.top_p < 1:
        # Keep the smallest set of most likely tokens whose sum reaches top_p; at least one.
        target_mass = settings.top_p * cumulative_sum(p)[:, -1:]
        for k in (min(p.shape[-1], TOP_P_CANDIDATES), p.shape[-1]):
            sorted_probs = top_values(p, k)
            reached = cumulative_sum(sorted_probs) >= target_mass
            if xp.all(reached[:, -1]):
                break
        # The largest value with which the sum reaches the target is the last one kept. None, by rounding: keep all.
        p = keep_at_least(
            p, xp.max(xp.where(reached, sorted_probs, xp.zeros_like(sorted_probs)), axis=-1, keepdims=True)
        )
    if settings.min_p > 0:
        p = keep_at_least(p, float(settings.min_p) * xp.max(p, axis=-1, keepdims=True))
    return p


def keep_at_least(p: Logits, threshold: Logits) -> Logits:
    """Set values of p below the threshold to 0."""
    xp = array_namespace(p)
    return xp.where(p >= threshold, p, xp.zeros_like(p))


def top_values(p: Logits, k: int) -> Logits:
    """Return the k largest values of each row, in descending order.

    The array API only offers a full sort, which is ten times slower than these selections.
    """
    if not isinstance(p, np.ndarray):
        return p.topk(k, dim=-1).values
    # Negated: NumPy's partition is ten times slower where most values are equal to the smallest.
    return -np.sort(np.partition(-p, k - 1, axis=-1)[:, :k], axis=-1)


def inverse_cdf_sample(p: Logits, u: npt.NDArray[np.float32]) -> Logits:
    """Sample ids (B,) by inverting the cumulative distribution at u (B,) in [0, 1); -1 for a row that contains NaN."""
    xp = array_namespace(p)
    cdf = cumulative_sum(p)
    reached = (p > 0) & (cdf > xp.asarray(u, dtype=xp.float32, device=p.device)[:, None] * cdf[:, -1:])
    # p > 0: a parallel cumulative sum may increase by rounding at tokens with p = 0, which must not be sampled.
    # argmax of the mask is its first true element. For u close to 1, rounding may leave none: fall back to argmax of p.
    mask = xp.astype(reached, xp.uint8)
    ids = xp.where(xp.any(reached, axis=-1), xp.argmax(mask, axis=-1), xp.argmax(p, axis=-1))
    return xp.where(cdf[:, -1] > 0, ids, xp.full_like(ids, -1))


def find_candidates(logits: Logits, settings: SamplingConfig) -> npt.NDArray[np.intp] | None:
    """Return the ids, ascending, that may be sampled in any row: usually few, so that sampling from them is fast.

    May return some ids too many. Returns None if the logits are not finite, or for arrays other than NumPy's, whose
    weights are not rounded (and getting the number of candidates would wait for the GPU).
    """
    if not isinstance(logits, np.ndarray):
        return None
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        return None
    lowest = top + np.float32(logit_gap(settings)) - np.float32(LOGIT_MARGIN) * np.abs(top)
    return np.flatnonzero((logits >= lowest).any(axis=0))


def argmax(logits: Logits) -> Logits:
    """Return the ids (B,) of the largest logits, the lowest id on ties; -1 for a row whose largest is not finite."""
    xp = array_namespace(logits)
    ids = xp.argmax(logits, axis=-1)
    return xp.where(xp.isfinite(xp.max(logits, axis=-1)), ids, xp.full_like(ids, -1))


def sample(logits: Logits, settings: SamplingConfig, u: npt.NDArray[np.float32], seen: Mask | None = None) -> list[int]:
    """Sample the next id of each row of logits (B, V) with the uniform numbers u (B,).

    `seen` (B, V) marks the ids that the repetition penalty applies to. Raises `UserError` if a row contains NaN or
    +inf, or only -inf.
    """
    return check_ids(sample_unchecked(logits, settings, u, seen))


def sample_unchecked(
    logits: Logits, settings: SamplingConfig, u: npt.NDArray[np.float32], seen: Mask | None = None
) -> list[int]:
    """Sample as `sample` does; the id of a row whose logits are not finite is -1."""
    z = apply_repetition_penalty(logits, settings.repetition_penalty, seen)
    if settings.temperature == 0:
        ids = argmax(z).tolist()
    elif (candidate_ids := find_candidates(z, settings)) is not None:
        x = (z[:, candidate_ids] - z.max(axis=1, keepdims=True)) / clamp_temperature(settings.temperature)
        ids = candidate_ids[inverse_cdf_sample(apply_filters(exp(x), settings), u)].tolist()
    else:
        ids = inverse_cdf_sample(compute_weights(z, settings), u).tolist()
    return list(ids)


def check_ids(ids: list[int]) -> list[int]:
    """Return sampled ids; raise `UserError` if one of them is -1, which stands for logits that are not finite."""
    if min(ids) < 0:
        raise UserError("the model's logits are not finite; its weights are damaged: use another checkpoint")
    return ids


class SlotSampler:
    """Samples for the slots of an engine, each with settings of its own; by the engine's own sampler if it has one."""

    def __init__(self, engine: Engine) -> None:
        self.state = SamplingState(engine.n_slots, engine.config.vocab_size)
        self.engine_sample = engine.sample if isinstance(engine, SamplingEngine) else None

    def sample(self, logits: Logits, slots: Sequence[int], u: Sequence[float]) -> list[int]:
        """Sample the next id of each row of logits (B, V), which belongs to a slot. Raises `UserError` as `sample`."""
        return check_ids(self.sample_unchecked(logits, slots, u))

    def sample_unchecked(self, logits: Logits, slots: Sequence[int], u: Sequence[float]) -> list[int]:
        """Sample as `sample` does; the id of a row whose largest logit is not finite is -1."""
        if self.engine_sample is not None:
            return self.engine_sample(logits, slots, u, self.state)
        rows_by_settings: dict[SamplingConfig, list[int]] = {}  # one call for each group of equal settings
        for row, slot in enumerate(slots):
            rows_by_settings.setdefault(self.state.settings[slot], []).append(row)
        ids = [0] * len(slots)
        for settings, rows in rows_by_settings.items():
            selected = logits if len(rows) == len(slots) else logits[rows]
            seen = self.state.seen_mask([slots[row] for row in rows]) if settings.repetition_penalty != 1 else None
            selected_u = np.array([u[row] for row in rows], dtype=np.float32)
            for row, token in zip(rows, sample_unchecked(selected, settings, selected_u, seen), strict=True):
                ids[row] = token
        return ids


class UniformStream:
    """The random numbers of one story: token t uses the t-th number of a generator seeded with (seed, story).

    A story therefore depends neither on its batch nor on the engine.
    """

    CHUNK = 64  # numbers generated at once, since a call of the generator costs more than a number

    def __init__(self, seed: int, story: int) -> None:
        self._rng: Any = np.random.default_rng([seed, story])
        self._chunk: Iterator[float] = iter(())

    def next(self) -> float:
        """Return the next number in [0, 1): a multiple of 2^-24, exact in fp32."""
        for number in self._chunk:
            return number
        self._chunk = iter(self._rng.random(self.CHUNK, dtype=np.float32).tolist())
        return next(self._chunk)
