"""Sampling of the next token: one implementation for all engines, run on the device that holds the logits.

Written against the array API standard, so that the same code works on NumPy arrays and on torch tensors on any device
(rationale: docs/decisions/0003-sampling.md). Shapes: B is the number of rows in the batch, V the vocabulary size.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import SamplingConfig
from tinystories.engine.protocol import Logits
from tinystories.errors import UserError

# top_p tries this many of the largest probabilities before it sorts the whole vocabulary.
TOP_P_CANDIDATES = 1024
# Lower temperatures are raised to this: they would underflow to 0 in fp32, and they sample the same tokens.
MIN_TEMPERATURE = 1e-30


def array_namespace(array: Logits) -> Any:
    """Return the array API namespace of an array.

    NumPy implements the standard itself since 2.1. Only torch needs array_api_compat, which takes 0.1 s to import.
    """
    if isinstance(array, np.ndarray):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(array)


def compute_probabilities(
    logits: Logits, settings: SamplingConfig, history: Sequence[Collection[int]] | None = None
) -> Logits:
    """Return the distribution (B, V) that the next token of each row is sampled from.

    fp32; each row sums to 1, or is NaN if its logits are not finite. Logits of -inf are allowed: these tokens have
    probability 0.

    Applied in this order: the repetition penalty on the ids in `history` (for each row, the distinct ids seen so far),
    temperature, top_k, top_p, min_p. Each filter works on the output of the previous one. Tokens that tie with the last
    one kept are also kept, so that the result does not depend on sort order.
    """
    xp = array_namespace(logits)
    z = apply_repetition_penalty(logits, settings.repetition_penalty, history)
    top = xp.max(z, axis=-1, keepdims=True)  # subtracted before exp, for numerical stability
    valid = xp.isfinite(top)
    z, top = xp.where(valid, z, xp.zeros_like(z)), xp.where(valid, top, xp.zeros_like(top))
    if settings.temperature == 0:
        ids = xp.arange(z.shape[-1], device=z.device)
        p = xp.astype(ids == xp.argmax(z, axis=-1, keepdims=True), xp.float32)
    else:
        p = apply_filters(xp.exp((z - top) / max(settings.temperature, MIN_TEMPERATURE)), settings)
    return xp.where(valid, p / xp.sum(p, axis=-1, keepdims=True), xp.full_like(top, float("nan")))


def apply_repetition_penalty(logits: Logits, penalty: float, history: Sequence[Collection[int]] | None) -> Logits:
    """Divide positive logits of ids in `history` by the penalty, multiply negative ones (CTRL, arXiv 1909.05858)."""
    if penalty == 1 or not history or not any(history):
        return logits
    xp = array_namespace(logits)
    seen_mask = np.zeros(tuple(logits.shape), dtype=bool)
    for row, ids in enumerate(history):
        seen_mask[row, list(ids)] = True
    penalized = xp.where(logits > 0, logits / penalty, logits * penalty)
    return xp.where(xp.asarray(seen_mask, device=logits.device), penalized, logits)


def apply_filters(p: Logits, settings: SamplingConfig) -> Logits:
    """Set the unnormalized probabilities (B, V) that top_k, top_p or min_p reject to 0."""
    xp = array_namespace(p)
    if 0 < settings.top_k < p.shape[-1]:
        p = keep_at_least(p, top_values(p, settings.top_k)[:, -1:])
    if settings.top_p < 1:
        # Keep the smallest set of most likely tokens whose sum reaches top_p; at least one.
        target_mass = settings.top_p * xp.sum(p, axis=-1, keepdims=True)
        sorted_probs = top_values(p, min(p.shape[-1], TOP_P_CANDIDATES))
        if not xp.all(xp.sum(sorted_probs, axis=-1, keepdims=True) >= target_mass):
            sorted_probs = top_values(p, p.shape[-1])
        below_target = xp.cumulative_sum(sorted_probs, axis=-1) - sorted_probs < target_mass
        p = keep_at_least(p, xp.min(xp.where(below_target, sorted_probs, sorted_probs[:, :1]), axis=-1, keepdims=True))
    if settings.min_p > 0:
        p = keep_at_least(p, settings.min_p * xp.max(p, axis=-1, keepdims=True))
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
    n_dropped = p.shape[-1] - k
    return np.sort(np.partition(p, n_dropped, axis=-1)[:, n_dropped:] if n_dropped else p, axis=-1)[:, ::-1]


def inverse_cdf_sample(p: Logits, u: npt.NDArray[np.float32]) -> Logits:
    """Sample ids (B,) by inverting the cumulative distribution at u (B,) in [0, 1); -1 for a row that contains NaN."""
    xp = array_namespace(p)
    cdf = xp.cumulative_sum(p, axis=-1)
    reached = (p > 0) & (cdf > xp.asarray(u, dtype=p.dtype, device=p.device)[:, None] * cdf[:, -1:])
    # p > 0: a parallel cumulative sum may increase by rounding at tokens with p = 0, which must not be sampled.
    # argmax of the mask is its first true element. For u close to 1, rounding may leave none: fall back to argmax of p.
    mask = xp.astype(reached, xp.uint8)
    ids = xp.where(xp.any(reached, axis=-1), xp.argmax(mask, axis=-1), xp.argmax(p, axis=-1))
    return xp.where(cdf[:, -1] > 0, ids, xp.full_like(ids, -1))


def find_min_p_candidates(logits: Logits, settings: SamplingConfig) -> npt.NDArray[np.intp] | None:
    """Return the ids, ascending, that min_p may keep in any row: usually few, so that sampling from them is fast.

    Returns None if the whole vocabulary is needed: with other filters or a repetition penalty, if the logits are not
    finite, or for arrays other than NumPy's (getting the number of candidates would wait for the GPU).
    """
    only_min_p = settings.min_p > 0 and settings.top_p == 1 and settings.repetition_penalty == 1
    if not (only_min_p and isinstance(logits, np.ndarray)):
        return None
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        return None
    # exp((z - top) / temperature) >= min_p, solved for z, with a margin for rounding. The margin may select a few ids
    # too many; `apply_filters` decides exactly.
    max_logit_gap = max(settings.temperature, MIN_TEMPERATURE) * math.log(settings.min_p) * 1.001 - 1e-5 * np.abs(top)
    return np.flatnonzero((logits >= top + max_logit_gap).any(axis=0))


def argmax(logits: Logits) -> Logits:
    """Return the ids (B,) of the largest logits, the lowest id on ties; -1 for a row whose largest is not finite."""
    xp = array_namespace(logits)
    ids = xp.argmax(logits, axis=-1)
    return xp.where(xp.isfinite(xp.max(logits, axis=-1)), ids, xp.full_like(ids, -1))


def sample(
    logits: Logits,
    settings: SamplingConfig,
    u: npt.NDArray[np.float32],
    history: Sequence[Collection[int]] | None = None,
) -> list[int]:
    """Sample the next id of each row of logits (B, V) with the uniform numbers u (B,).

    `history` holds, for each row, the distinct ids that the repetition penalty applies to. Raises `UserError` if a row
    contains NaN or +inf, or only -inf.
    """
    if settings.temperature == 0:
        ids = argmax(apply_repetition_penalty(logits, settings.repetition_penalty, history)).tolist()
    elif (candidate_ids := find_min_p_candidates(logits, settings)) is not None:
        # Left unnormalized: the rounding of a row's sum would depend on the candidates of the other rows in the batch.
        z = logits[:, candidate_ids] - logits.max(axis=1, keepdims=True)
        ids = candidate_ids[
            inverse_cdf_sample(apply_filters(np.exp(z / max(settings.temperature, MIN_TEMPERATURE)), settings), u)
        ].tolist()
    else:
        ids = inverse_cdf_sample(compute_probabilities(logits, settings, history), u).tolist()
    if min(ids) < 0:
        raise UserError("the model's logits are not finite; its weights are damaged: use another checkpoint")
    return ids


class UniformStream:
    """The random numbers of one story: token t uses the t-th number of a generator seeded with (seed, story).

    A story therefore depends neither on its batch nor on the engine.
    """

    def __init__(self, seed: int, story: int) -> None:
        self._rng: Any = np.random.default_rng([seed, story])

    def next(self) -> np.float32:
        """Return the next number in [0, 1): a multiple of 2^-24, exact in fp32."""
        return np.float32(self._rng.random(dtype=np.float32))
