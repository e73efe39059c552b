"""Two texts or two models side by side: from traces to the numbers that the lab shows."""

from typing import Any

import numpy as np

from tinystories.data.tokenizer import Tokenizer
from tinystories.explain.text_trace import TextTrace, finite
from tinystories.explain.token_text import token_label
from tinystories.generate.next_token import ALL_OFF, trace_next_token
from tinystories.serve.lab import answers

MAX_PIECES = 4096  # of a text that is only split


def describe_side(name: str, trace: TextTrace, text: str, top: int) -> dict[str, Any]:
    """Return the tokens of a text, their surprise, and the likeliest next tokens of the model alone."""
    tokens = answers.describe_tokens(trace.tokenizer, text, [], trace.config.n_ctx)
    step = trace_next_token(trace, ALL_OFF)
    next_ids = np.argsort(-step.model_probs, kind="stable")[:top]
    return {
        "name": name,
        **tokens,
        **answers.score(trace),
        "next": [
            [int(token), token_label(trace.tokenizer, token), round(float(step.model_probs[token]), 6)]
            for token in next_ids.tolist()
        ],
        "next_entropy_bits": finite(step.entropy_bits),
    }


def compare_sides(names: tuple[str, str], traces: tuple[TextTrace, TextTrace], texts: tuple[str, str], top: int) -> Any:
    """Return both sides. If they have the same tokens, also the probability of each next token on both sides, the
    likeliest first, and how far the two distributions overlap (1: they are equal)."""
    sides = [describe_side(name, trace, text, top) for name, trace, text in zip(names, traces, texts, strict=True)]
    a, b = traces
    answer: dict[str, Any] = {"a": sides[0], "b": sides[1], "same_tokens": have_same_tokens(a, b), "next": None}
    if answer["same_tokens"]:
        probs_a, probs_b = (trace_next_token(trace, ALL_OFF).model_probs.astype(np.float64) for trace in traces)
        union = {token for side in sides for token, _, _ in side["next"]}
        ids = sorted(union, key=lambda token: (-max(probs_a[token], probs_b[token]), token))
        answer["next"] = [
            {
                "id": token,
                "label": token_label(a.tokenizer, token),
                "a": round(float(probs_a[token]), 6),
                "b": round(float(probs_b[token]), 6),
            }
            for token in ids
        ]
        answer["overlap"] = finite(float(np.minimum(probs_a, probs_b).sum()))
    return answer


def have_same_tokens(a: TextTrace, b: TextTrace) -> bool:
    """Whether an id means the same on both sides."""
    return a.tokenizer.sha256 == b.tokenizer.sha256 and a.config.vocab_size == b.config.vocab_size


def split_text(name: str, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Return how a tokenizer splits a text: the number of tokens, and the first ones with their places."""
    tokens = answers.describe_tokens(tokenizer, text, [], len(text.encode()) + 1)
    pieces = tokens["pieces"][1:]  # without END
    return {
        "name": name,
        "vocab_size": tokenizer.vocab_size,
        "n_tokens": len(pieces),
        "n_bytes": len(text.encode()),
        "pieces": pieces[:MAX_PIECES],
    }
