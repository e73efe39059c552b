"""From a trace to the numbers that the lab shows; every one is a number of the Python API."""

import base64
import codecs
import dataclasses
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.trace.trace import check_layer
from tinystories.errors import UserError
from tinystories.explain.text_trace import TextTrace, finite, rounded, stage_name
from tinystories.explain.token_text import token_label
from tinystories.generate.next_token import seen_mask, trace_next_token
from tinystories.generate.sampling import UniformStream, sample
from tinystories.serve.model import ServedModel

TRIANGLES, THUMBNAILS = 1, 2  # kinds of matrices in the answer of `attention`
THUMBNAIL_SIZE = 48


def describe_model(config: ModelConfig, model: ServedModel) -> dict[str, Any]:
    """Return what the page needs to know about a model."""
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size")}
    return {
        "name": model.name,
        **sizes,
        "architecture": config.architecture,
        "n_params": config.n_params,
        "bits_per_byte": model.meta.get("bits_per_byte"),
        "end_id": model.tokenizer.end_id,
        "sampling": dataclasses.asdict(model.sampling),
        "load_options": model.load_options,
    }


def describe_tokens(tokenizer: Tokenizer, text: str, append: list[int], n_ctx: int) -> dict[str, Any]:
    """Return END, the ids of a text and those to append, with their pieces: at most the last n_ctx.

    `start` and `end` of a piece count UTF-16 code units of `text`, as JavaScript does. A piece that ends inside a
    character is empty there; the one that completes the character has all of it.
    """
    all_ids = [tokenizer.end_id, *tokenizer.encode(text), *append]
    ids = all_ids[-n_ctx:]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    table = tokenizer.token_bytes
    pieces, parts, n_units = [], [], 0
    for token in ids:
        part = decoder.decode(table[token] if token < len(table) else b"")
        start, n_units = n_units, n_units + len(part.encode("utf-16-le")) // 2
        pieces.append({"id": token, "label": token_label(tokenizer, token), "start": start, "end": n_units})
        parts.append(part)
    return {
        "ids": ids,
        "text": "".join([*parts, decoder.decode(b"", final=True)]),
        "n_tokens": len(all_ids),
        "n_dropped": len(all_ids) - len(ids),
        "pieces": pieces,
    }


def score(trace: TextTrace) -> dict[str, Any]:
    """Return the surprise of each token, and what the model expected in its place."""
    predictions = trace.predictions
    top = pairs(predictions.top_ids[0, :-1], predictions.top_probs[0, :-1])
    return {
        "mean_bits": finite(trace.mean_bits),
        "bits_per_byte": finite(trace.bits_per_byte),
        "surprise_bits": [None, *rounded(trace.surprise_bits[1:])],
        "ranks": trace.ranks.tolist(),
        "entropy_bits": [None, *rounded(predictions.entropy_bits[0, :-1])],
        "top": [[], *top],
        "labels": labels(trace.tokenizer, predictions.top_ids),
    }


def pairs(ids: npt.NDArray[np.int64], probs: npt.NDArray[np.float32]) -> Any:
    """Return arrays (..., k) as lists of (id, probability)."""
    if ids.ndim == 1:
        return list(zip(ids.tolist(), np.round(probs.astype(np.float64), 6).tolist(), strict=True))
    return [pairs(row, row_probs) for row, row_probs in zip(ids, probs, strict=True)]


def labels(tokenizer: Tokenizer, ids: npt.NDArray[np.int64]) -> dict[str, str]:
    """Return the label of each id in an array."""
    return {str(token): token_label(tokenizer, token) for token in np.unique(ids).tolist()}


def describe_next(trace: TextTrace, settings: SamplingConfig, top: int, *, with_logits: bool = False) -> dict[str, Any]:
    """Return the candidates for the next token, in descending order of the model's probability, and END.

    With `with_logits` also what the page needs to apply other settings itself: `logits`, the fp32 numbers of all V ids,
    little-endian, in Base64, and `seen`, the ids that a repetition penalty would apply to.
    """
    step = trace_next_token(trace, settings)
    answer = step.as_dict(top)
    for candidate in answer["candidates"]:
        candidate["label"] = token_label(trace.tokenizer, candidate["id"])
    answer["end_id"] = trace.tokenizer.end_id
    if with_logits:
        penalized = dataclasses.replace(settings, repetition_penalty=2.0)  # without a penalty no ids are kept
        answer["seen"] = np.flatnonzero(seen_mask(trace, penalized)).tolist()
        logits = trace.logits([len(trace.ids) - 1])[0].astype("<f4")
        answer["logits"] = base64.b64encode(logits.tobytes()).decode()
    return answer


def draw(trace: TextTrace, settings: SamplingConfig, seed: int, index: int) -> dict[str, Any]:
    """Return the token that a seed samples, with the uniform number `u`
    and `below`, the probability of all lower ids: `u` lies between `below` and `below` plus the token's own."""
    stream = UniformStream(seed, 0)
    for _ in range(index):
        stream.next()
    u = stream.next()
    logits = trace.logits([len(trace.ids) - 1])
    token = sample(logits, settings, np.array([u], np.float32), seen_mask(trace, settings)[None])[0]
    step = trace_next_token(trace, settings)
    below = float(step.final_probs[:token].sum(dtype=np.float64))
    label = token_label(trace.tokenizer, token)
    return dataclasses.asdict(step.candidate(token)) | {"label": label, "u": u, "below": below}


def attention(trace: TextTrace, layer: int | None, head: int | None) -> bytes:
    """Return attention as bytes, round(255 * sqrt(p)), behind a header of three little-endian 32-bit numbers:
    kind, number of matrices, size.

    With a layer (and a head): the lower triangles of its heads (or of that one), row by row. Without: a thumbnail
    of each head, layer by layer; each cell is the largest of those it stands for.
    """
    if layer is None:
        if head is not None:
            raise UserError("a head without its layer: give both")
        thumbnails = [shrink(trace.attention_bytes(i)) for i in range(trace.config.n_layer)]
        matrices = np.concatenate(thumbnails)
        return struct.pack("<III", THUMBNAILS, len(matrices), matrices.shape[1]) + matrices.tobytes()
    check_layer(layer, trace.config)
    if head is not None and head >= trace.config.n_head:
        raise UserError(f"head {head} does not exist: a layer has {trace.config.n_head}, numbered from 0")
    matrices = trace.attention_bytes(layer)
    if head is not None:
        matrices = matrices[head : head + 1]
    rows, columns = np.tril_indices(matrices.shape[1])
    return struct.pack("<III", TRIANGLES, len(matrices), matrices.shape[1]) + matrices[:, rows, columns].tobytes()


def shrink(matrices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Reduce matrices (H, T, T) to at most (H, THUMBNAIL_SIZE, THUMBNAIL_SIZE) by the maximum of each block."""
    n = matrices.shape[1]
    edges = np.arange(min(n, THUMBNAIL_SIZE)) * n // min(n, THUMBNAIL_SIZE)
    return np.maximum.reduceat(np.maximum.reduceat(matrices, edges, axis=1), edges, axis=2)


def summarize_heads(trace: TextTrace) -> dict[str, Any]:
    """Return how much attention each head (layer, head) pays, on average over the tokens, to certain tokens: the first
    of the text, the token itself, the one before it, and earlier ones with the same id.

    Only tokens from the third on count: before that, the first token and the one before are the same.
    """
    ids, n = trace.ids, len(trace.ids)
    names = ("first", "self", "previous", "same")
    if n < 3:
        return {name: [] for name in names}
    rows = np.arange(2, n)
    same = np.tril(ids[:, None] == ids[None], -1)[2:]
    summary: dict[str, list[Any]] = {name: [] for name in names}
    for layer in range(trace.config.n_layer):
        probs = trace.layer_attention(layer)
        summary["first"].append(rounded(probs[:, 2:, 0].mean(axis=1)))
        summary["self"].append(rounded(probs[:, rows, rows].mean(axis=1)))
        summary["previous"].append(rounded(probs[:, rows, rows - 1].mean(axis=1)))
        summary["same"].append(rounded((probs[:, 2:] * same).sum(axis=2).mean(axis=1)))
    return summary


def logit_lens(trace: TextTrace, start: int, stop: int, top: int) -> dict[str, Any]:
    """Return what each stage predicts after the positions start .. stop - 1: lists of stages of positions."""
    lens = trace.logit_lens(top=top, positions=range(start, stop))
    return {
        "stages": [stage_name(stage) for stage in lens.stages.tolist()],
        "positions": lens.positions.tolist(),
        "top": pairs(lens.top_ids, lens.top_probs),
        "final_ids": lens.final_ids.tolist(),
        "final_probs": rounded(lens.final_probs),
        "final_ranks": lens.final_ranks.tolist(),
        "next_ranks": lens.next_ranks.tolist(),
        "kl_bits": rounded(lens.kl_bits),
        "labels": labels(trace.tokenizer, np.concatenate((lens.top_ids.ravel(), lens.final_ids))),
    }


def ablate(trace: TextTrace, heads: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the surprise of each token with and without these heads, and the likeliest next tokens."""
    ablated = trace.ablate(heads)
    before, after = trace.predictions, ablated.predictions
    return {
        "mean_bits": finite(trace.mean_bits),
        "ablated_mean_bits": finite(ablated.mean_bits),
        "surprise_bits": [None, *rounded(trace.surprise_bits[1:])],
        "ablated_surprise_bits": [None, *rounded(ablated.surprise_bits[1:])],
        "top": pairs(before.top_ids[0, -1], before.top_probs[0, -1]),
        "ablated_top": pairs(after.top_ids[0, -1], after.top_probs[0, -1]),
        "labels": labels(trace.tokenizer, np.concatenate((before.top_ids[0, -1], after.top_ids[0, -1]))),
    }
