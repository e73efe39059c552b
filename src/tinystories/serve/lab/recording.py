"""A recording: what the lab's page asks about one text, answered in advance, for a page that has no server."""

import base64
from typing import Any

import numpy as np

from tinystories.errors import UserError
from tinystories.explain.text_trace import TextTrace, trace_text
from tinystories.generate.batching import check_text
from tinystories.generate.sampling import UniformStream
from tinystories.generate.storyteller import Storyteller
from tinystories.serve.lab import answers
from tinystories.serve.model import ServedModel

SEED = 1  # of draws and endings: the page's own default; draws at one place use this seed and those after it
N_CANDIDATES = 40
N_SEEDS, N_UNIFORMS = 40, 4
N_FIRST, N_SECOND = 12, 3  # paths that can be followed: after the text, and after the likeliest of these
N_ENDINGS, ENDING_TOKENS = 8, 400
MAX_ABLATED_HEADS = 64  # each costs a pass through the model; with more heads there are no recorded ablations
MAX_ATTENTION_BYTES = 16_000_000


def record(storyteller: Storyteller, model: ServedModel, text: str) -> dict[str, Any]:
    """Return the answers to the questions of the page about a text, by the path of the question.

    `UserError` if the text is not valid, or if the attention of this model to it would make the page too large.
    """
    check_text(text, "--text")
    tokenizer, config = storyteller.tokenizer, storyteller.engine.config
    tokens = answers.describe_tokens(tokenizer, text, [], config.n_ctx)
    n, n_heads = len(tokens["ids"]), config.n_layer * config.n_head
    n_bytes = n_heads * n * (n + 1) // 2
    if n_bytes > MAX_ATTENTION_BYTES:
        raise UserError(
            f"the attention of {n_heads} heads in {n} tokens needs {n_bytes / 1e6:.0f} MB, more than the"
            f" {MAX_ATTENTION_BYTES / 1e6:.0f} MB of a page; shorten --text"
        )
    trace = trace_text(storyteller.trace_model, tokenizer, tokens["ids"])
    heads = [(layer, head) for layer in range(config.n_layer) for head in range(config.n_head)]
    return {
        "text": text,
        "model": answers.describe_model(config, model),
        "paths": record_paths(trace, model, text),
        "score": answers.score(trace),
        "thumbnails": encode(answers.attention(trace, None, None)),
        "attention": {f"{layer}.{head}": encode(answers.attention(trace, layer, head)) for layer, head in heads},
        "heads": answers.summarize_heads(trace),
        "lens": answers.logit_lens(trace, 0, n, top=5),
        "ablations": {
            f"{layer}.{head}": answers.ablate(trace, [(layer, head)])
            for layer, head in (heads if len(heads) <= MAX_ABLATED_HEADS else [])
        },
        "seed": SEED,
        "uniforms": [list_uniforms(seed) for seed in range(SEED, SEED + N_SEEDS)],
        "endings": tell_endings(storyteller, text, tokens["n_dropped"]),
    }


def record_paths(trace: TextTrace, model: ServedModel, text: str) -> dict[str, Any]:
    """Return tokens and next tokens after the text and after some paths from it, by the ids of the path: "", "5,17"."""
    paths: dict[str, Any] = {}

    def add(path: list[int], start: TextTrace) -> TextTrace:
        tokens = answers.describe_tokens(trace.tokenizer, text, path, trace.config.n_ctx)
        # While all of the text is in the context, its hidden states need not be computed again.
        known = start.hidden if tokens["ids"][:-1] == start.ids.tolist() else None
        here = trace_text(trace.model, trace.tokenizer, tokens["ids"], known=known) if path else trace
        step = answers.describe_next(here, model.sampling, N_CANDIDATES, with_logits=True)
        paths[",".join(map(str, path))] = {"tokens": tokens, "next": step}
        return here

    add([], trace)
    first = [candidate["id"] for candidate in paths[""]["next"]["candidates"]]
    end_id = trace.tokenizer.end_id
    for rank, token in enumerate(dict.fromkeys([*first[:N_FIRST], end_id])):
        here = add([token], trace)
        if rank < N_SECOND and token != end_id:
            candidates = paths[str(token)]["next"]["candidates"]
            for second in [candidate["id"] for candidate in candidates[:N_SECOND]]:
                add([token, second], here)
    return paths


def tell_endings(storyteller: Storyteller, text: str, n_dropped: int) -> list[str]:
    """Return endings of the text with the model's own settings; none if it is longer than the context."""
    if n_dropped:
        return []
    stories = storyteller.generate(text, num=N_ENDINGS, seed=SEED, max_tokens=ENDING_TOKENS)
    return [story.continuation for story in stories]


def list_uniforms(seed: int) -> list[float]:
    """Return the numbers with which a seed draws the first tokens."""
    stream = UniformStream(seed, 0)
    return np.array([stream.next() for _ in range(N_UNIFORMS)], dtype=np.float64).tolist()


def encode(data: bytes) -> str:
    """Return bytes as text."""
    return base64.b64encode(data).decode()
