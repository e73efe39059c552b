"""How the next token is chosen, step by step: its probabilities before and after each filter.

The steps are those of `generate.sampling`, in its order; the last one is the distribution that is sampled from.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Logits
from tinystories.engine.sampling_state import SamplingState
from tinystories.explain.text_trace import TextTrace
from tinystories.explain.token_text import token_text
from tinystories.generate.sampling import (
    Mask,
    apply_filters,
    apply_repetition_penalty,
    check_ids,
    compute_weights,
)

Floats = npt.NDArray[np.float32]
STEPS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
ALL_OFF = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A token that may come next. `cut_by` names the step that sets its probability to 0; None: it may be sampled.

    `after` has its probability after each step of `STEPS`.
    """

    id: int
    text: str
    model_prob: float
    final_prob: float
    cut_by: str | None
    after: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NextToken:
    """The distribution of the next token of V ids: by the model, after each step, and at the end.

    With a temperature of 0 the most likely token has probability 1, and the filters do nothing. At any temperature,
    tokens whose probability is below 2^-31 of the largest are cut by it.
    """

    settings: SamplingConfig
    model_probs: Floats  # (V,) softmax of the logits
    after: dict[str, Floats]  # (V,) after each step of STEPS
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    @property
    def final_probs(self) -> Floats:
        """The probabilities (V,) that the next token is sampled with."""
        return self.after[STEPS[-1]]

    @property
    def n_kept(self) -> int:
        """How many tokens may be sampled."""
        return int(np.count_nonzero(self.final_probs))

    @property
    def entropy_bits(self) -> float:
        """Entropy of the model's distribution."""
        probs = self.model_probs[self.model_probs > 0].astype(np.float64)
        return float(-(probs * np.log2(probs)).sum())

    def cut_by(self, token: int) -> str | None:
        """Return the first step after which this id has probability 0; None if it may be sampled."""
        return next((step for step in STEPS[1:] if self.after[step][token] == 0), None)

    def candidates(self, n: int = 12) -> list[Candidate]:
        """Return the n tokens that the model finds most likely, in descending order, and END if it is not among them.

        The probability of all others is 1 - the sum over the candidates.
        """
        order = np.argsort(-self.model_probs, kind="stable")[: max(n, 0)].tolist()
        return [self.candidate(token) for token in dict.fromkeys([*order, self.tokenizer.end_id])]

    def candidate(self, token: int) -> Candidate:
        """Return one id with its probabilities."""
        return Candidate(
            id=token,
            text=token_text(self.tokenizer, token),
            model_prob=float(self.model_probs[token]),
            final_prob=float(self.final_probs[token]),
            cut_by=self.cut_by(token),
            after={step: float(probs[token]) for step, probs in self.after.items()},
        )

    def as_dict(self, n: int = 12) -> dict[str, Any]:
        """Return the settings, the totals and the candidates as a JSON-serializable dict."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "n_kept": self.n_kept,
            "entropy_bits": self.entropy_bits,
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates(n)],
        }


def analyze_next_token(
    logits: Logits, settings: SamplingConfig, tokenizer: Tokenizer, seen: Mask | None = None
) -> NextToken:
    """Return the distribution of the next token after each step from the logits (V,).

    `seen` (V,) marks the ids that the repetition penalty applies to. Raises `UserError` if the logits are not finite.
    """
    row = (logits if isinstance(logits, np.ndarray) else logits.cpu().numpy())[None]
    if not np.isfinite(row.max()):
        check_ids([-1])
    penalized = apply_repetition_penalty(row, settings.repetition_penalty, None if seen is None else seen[None])
    weights = compute_weights(penalized, dataclasses.replace(ALL_OFF, temperature=settings.temperature))
    after = {"repetition_penalty": softmax(penalized[0]), "temperature": normalize(weights)}
    for name in STEPS[2:]:
        weights = apply_filters(weights, dataclasses.replace(ALL_OFF, **{name: getattr(settings, name)}))
        after[name] = normalize(weights)
    return NextToken(settings=settings, model_probs=softmax(row[0]), after=after, tokenizer=tokenizer)


def trace_next_token(trace: TextTrace, settings: SamplingConfig) -> NextToken:
    """Return the distribution of the token after the last one of a trace, from the trace's own logits."""
    logits = trace.logits([len(trace.ids) - 1])[0]
    return analyze_next_token(logits, settings, trace.tokenizer, seen_mask(trace, settings))


def seen_mask(trace: TextTrace, settings: SamplingConfig) -> Mask:
    """Return the ids (V,) that the repetition penalty applies to after a text that is a prompt."""
    ids = trace.ids.tolist()
    prompt_ids = ids[1:] if ids[0] == trace.tokenizer.end_id else ids
    state = SamplingState(1, trace.config.vocab_size)
    state.begin(0, settings, prompt_ids, trace.tokenizer.name_ids)
    return np.asarray(state.seen_mask([0])[0])


def softmax(logits: Floats) -> Floats:
    """Return the probabilities (V,) of logits (V,)."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def normalize(weights: Floats) -> Floats:
    """Return probabilities (V,) from the weights of one row (1, V), as `sampling.compute_probabilities` does."""
    return (weights / np.sum(weights, axis=-1, keepdims=True))[0]
