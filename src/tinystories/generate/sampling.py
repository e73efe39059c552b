"""How the next token is drawn: one definition for all engines, run where the logits are.

Written against the array API standard, so that the same lines work on NumPy arrays and on torch tensors of any device
(docs/decisions/0003-sampling.md says why). B rows in a batch, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import SamplingConfig
from tinystories.engine.protocol import Logits
from tinystories.errors import UserError

TOP_P_CANDIDATES = 1024  # top_p looks at so many of the largest before it sorts the whole vocabulary
MIN_TEMPERATURE = 1e-30  # a lower temperature is this one: it would underflow to 0 in fp32, and draws the same tokens


def array_namespace(array: Logits) -> Any:
    """The functions of the array API for a kind of array. NumPy's own have been those since 2.1; the package that mends
    torch's takes a tenth of a second to import all of NumPy for it.
    """
    if isinstance(array, np.ndarray):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(array)


def compute_probabilities(
    logits: Logits, settings: SamplingConfig, history: Sequence[Collection[int]] | None = None
) -> Logits:
    """What the next token of each row is drawn from: (B, V) fp32, rows sum to 1, NaN where the logits are not finite.

    First the repetition penalty on the ids in `history` (for each row the different ids that it holds), then
    temperature, then the filters top_k, top_p and min_p in this order, each on what the former left. Tokens that tie
    with the last one kept are kept too, so that the result does not depend on how an engine sorts. Logits of -inf are
    tokens that cannot be drawn.
    """
    xp = array_namespace(logits)
    z = apply_repetition_penalty(logits, settings.repetition_penalty, history)
    top = xp.max(z, axis=-1, keepdims=True)
    valid = xp.isfinite(top)
    z, top = xp.where(valid, z, xp.zeros_like(z)), xp.where(valid, top, xp.zeros_like(top))
    if settings.temperature == 0:
        ids = xp.arange(z.shape[-1], device=z.device)
        p = xp.astype(ids == xp.argmax(z, axis=-1, keepdims=True), xp.float32)
    else:
        p = apply_filters(xp.exp((z - top) / max(settings.temperature, MIN_TEMPERATURE)), settings)
    return xp.where(valid, p / xp.sum(p, axis=-1, keepdims=True), xp.full_like(top, float("nan")))


def apply_repetition_penalty(logits: Logits, penalty: float, history: Sequence[Collection[int]] | None) -> Logits:
    """Logits of ids seen before divided by the penalty where positive, multiplied where negative (CTRL, 1909.05858)."""
    if penalty == 1 or not history or not any(history):
        return logits
    xp = array_namespace(logits)
    seen_mask = np.zeros(tuple(logits.shape), dtype=bool)
    for row, ids in enumerate(history):
        seen_mask[row, list(ids)] = True
    penalized = xp.where(logits > 0, logits / penalty, logits * penalty)
    return xp.where(xp.asarray(seen_mask, device=logits.device), penalized, logits)


def apply_filters(p: Logits, settings: SamplingConfig) -> Logits:
    """Unnormalised probabilities (B, V) with those set to 0 that top_k, top_p or min_p refuse."""
    xp = array_namespace(p)
    if 0 < settings.top_k < p.shape[-1]:
        p = keep_at_least(p, top_values(p, settings.top_k)[:, -1:])
    if settings.top_p < 1:
        # Kept: the fewest tokens that reach top_p together, so at least one.
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
    xp = array_namespace(p)
    return xp.where(p >= threshold, p, xp.zeros_like(p))


def top_values(p: Logits, k: int) -> Logits:
    """The k largest values of each row, in falling order. The array API has no selection but a full sort, and that is
    ten times as slow as these."""
    if not isinstance(p, np.ndarray):
        return p.topk(k, dim=-1).values
    n_dropped = p.shape[-1] - k
    return np.sort(np.partition(p, n_dropped, axis=-1)[:, n_dropped:] if n_dropped else p, axis=-1)[:, ::-1]


def inverse_cdf_sample(p: Logits, u: npt.NDArray[np.float32]) -> Logits:
    """Ids (B,) by the inverse of the cumulative distribution at u in [0, 1); -1 for a row that holds NaN."""
    xp = array_namespace(p)
    cdf = xp.cumulative_sum(p, axis=-1)
    reached = (p > 0) & (cdf > xp.asarray(u, dtype=p.dtype, device=p.device)[:, None] * cdf[:, -1:])
    # p > 0, because a cumulative sum made in parallel may rise by rounding where p is 0.
    # argmax of a mask is its first true element. Rounding may leave none for u close to 1; then the likeliest token.
    mask = xp.astype(reached, xp.uint8)
    ids = xp.where(xp.any(reached, axis=-1), xp.argmax(mask, axis=-1), xp.argmax(p, axis=-1))
    return xp.where(cdf[:, -1] > 0, ids, xp.full_like(ids, -1))


def find_min_p_candidates(logits: Logits, settings: SamplingConfig) -> npt.NDArray[np.intp] | None:
    """The ids, ascending, that min_p leaves to any of the rows: few of a large vocabulary, and quick to draw from.

    None where all must be looked at: the other settings ask for it, logits are not finite, or arrays are not NumPy's,
    for which the number of candidates would have to be waited for.
    """
    only_min_p = settings.min_p > 0 and settings.top_p == 1 and settings.repetition_penalty == 1
    if not (only_min_p and isinstance(logits, np.ndarray)):
        return None
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        return None
    max_logit_gap = max(settings.temperature, MIN_TEMPERATURE) * math.log(settings.min_p) * 1.001 - 1e-5 * np.abs(top)
    return np.flatnonzero((logits >= top + max_logit_gap).any(axis=0))  # a few too many: `probabilities` is exact


def argmax(logits: Logits) -> Logits:
    """Ids (B,) of the largest logits, the first of equals; -1 for a row whose largest is not finite."""
    xp = array_namespace(logits)
    ids = xp.argmax(logits, axis=-1)
    return xp.where(xp.isfinite(xp.max(logits, axis=-1)), ids, xp.full_like(ids, -1))


def sample(
    logits: Logits,
    settings: SamplingConfig,
    u: npt.NDArray[np.float32],
    history: Sequence[Collection[int]] | None = None,
) -> list[int]:
    """The next id of each row of logits (B, V); `UserError` where the logits are NaN, infinite or all -inf."""
    if settings.temperature == 0:
        ids = argmax(apply_repetition_penalty(logits, settings.repetition_penalty, history)).tolist()
    elif (candidate_ids := find_min_p_candidates(logits, settings)) is not None:
        # Not divided by their sums, whose rounding would depend on the candidates of other rows.
        z = logits[:, candidate_ids] - logits.max(axis=1, keepdims=True)
        ids = candidate_ids[
            inverse_cdf_sample(apply_filters(np.exp(z / max(settings.temperature, MIN_TEMPERATURE)), settings), u)
        ].tolist()
    else:
        ids = inverse_cdf_sample(compute_probabilities(logits, settings, history), u).tolist()
    if min(ids) < 0:
        raise UserError("the model's logits are not finite; its weights are damaged, use another checkpoint")
    return ids


class UniformStream:
    """The randomness of one story: its t-th token uses the t-th number of a generator made from (seed, story).

    So a story depends neither on the batch it was made in nor on the engine.
    """

    def __init__(self, seed: int, story: int) -> None:
        if seed < 0:
            raise UserError(f"seed={seed} must not be negative")
        self._rng: Any = np.random.default_rng([seed, story])

    def next(self) -> np.float32:
        """In [0, 1), a multiple of 2^-24 and so exact in fp32."""
        return np.float32(self._rng.random(dtype=np.float32))
