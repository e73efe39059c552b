"""A model as the page reads it: a header in JSON, and the bytes of its int8 weights."""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories import checkpoint
from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.tokenizer_conversion import SPACE_SYMBOL, parse_merges
from tinystories.position_tables import rope_frequencies, sinusoid_frequencies
from tinystories.weights.load import load_int8_only, quantize_weights
from tinystories.weights.quantize import round_up
from tinystories.weights.safetensors_file import PADDING

Array = npt.NDArray[Any]
ALIGNMENT = 64  # bytes; of each tensor
# A sine or cosine this close to the middle between two fp32 numbers, relative to its size, might be rounded to the
# other one elsewhere: libraries differ in the last bits of fp64.
MIDDLE_TOLERANCE = 2.0**-44


def build_page_data(model: ModelBundle) -> tuple[dict[str, Any], bytearray]:
    """Return the header, which is JSON, and the bytes of the weights. `UserError` if the tokenizer is not supported."""
    header: dict[str, Any] = {"tokenizer": describe_tokenizer(model.tokenizer)}
    tensors = load_int8(model)
    places, n_bytes = place_tensors(tensors)
    header |= {
        "config": describe_config(model.config),
        "positions": describe_positions(model.config),
        "sampling": dataclasses.asdict(model.sampling),
        "name_ids": pack_bits(model.tokenizer.name_ids, model.config.vocab_size),
        "tensors": places,
        "weight_bytes": n_bytes,
    }
    return header, join_tensors(tensors, places, n_bytes)


def load_int8(model: ModelBundle) -> dict[str, Array]:
    """Return the model's tensors as the CPU engine has them with `--precision int8`, without quantizing twice."""
    if model.folder is not None:
        files = checkpoint.read_model(model.folder, verify_weights=False)
        if files.is_int8_only:
            weights = load_int8_only(files)
            return {name: array for name, array in weights.items() if not name.endswith(PADDING)}
    return quantize_weights(model.config, model.weights, "int8")


def place_tensors(tensors: Mapping[str, Array]) -> tuple[dict[str, dict[str, int]], int]:
    """Return where each tensor begins and its size, in bytes, and the size of all."""
    places, end = {}, 0
    for name, array in tensors.items():
        places[name] = {"start": end, "n_bytes": array.nbytes}
        end = round_up(end + array.nbytes, ALIGNMENT)
    return places, end


def join_tensors(tensors: Mapping[str, Array], places: Mapping[str, Mapping[str, int]], n_bytes: int) -> bytearray:
    """Return the bytes of all tensors at their places; numbers are little-endian."""
    data = bytearray(n_bytes)
    for name, array in tensors.items():
        start = places[name]["start"]
        data[start : start + array.nbytes] = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return data


def describe_config(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that the forward pass needs."""
    names = ("architecture", "vocab_size", "n_ctx", "n_layer", "n_head", "kv_heads", "head_dim", "n_embd", "n_ff")
    more = ("tied", "activation", "scaled_scores", "norm_eps", "n_params")
    windows = [config.layer_window(i) for i in range(config.n_layer)]
    return {name: getattr(config, name) for name in (*names, *more)} | {"windows": windows}


def describe_positions(config: ModelConfig) -> dict[str, Any] | None:
    """Return the frequencies of the position tables and the entries to fix; None for learned positions."""
    if config.learned_positions:
        return None
    if config.architecture == "classic":
        frequencies = sinusoid_frequencies(config.n_embd)
    else:
        frequencies = rope_frequencies(config.head_dim, config.rope_base)
    angles = np.arange(config.n_ctx)[:, None] * frequencies
    fixes = {"cos_fixes": find_fixes(np.cos(angles)), "sin_fixes": find_fixes(np.sin(angles))}
    return {"frequencies": frequencies.tolist()} | fixes


def find_fixes(values: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """Return (index, fp32 value) of the numbers that might be rounded to fp32 in another way elsewhere."""
    rounded = values.astype(np.float32)
    middles = [(rounded.astype(np.float64) + np.nextafter(rounded, np.float32(limit))) / 2 for limit in (-2, 2)]
    distance = np.minimum(*(np.abs(values - middle) for middle in middles))
    (indices,) = np.nonzero((distance <= MIDDLE_TOLERANCE * np.abs(values)).ravel())
    return [(int(i), float(rounded.flat[i])) for i in indices]


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the vocabulary and the merges of a BPE tokenizer, on bytes (GPT-2) or on characters (SentencePiece).

    `UserError` for others.
    """
    parts, bpe = tokenizer.json_data, tokenizer.json_data["model"]
    is_bpe = bpe.get("type", "BPE") == "BPE" and not any(not token["special"] for token in parts["added_tokens"])
    is_bpe = is_bpe and not (bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"))
    if is_bpe and tokenizer.is_lossless and parts["pre_tokenizer"].get("use_regex", True):
        kind = {"kind": "bytes", "ignore_merges": bool(bpe.get("ignore_merges"))}
    elif is_bpe and is_sentencepiece(parts):
        kind = {
            "kind": "characters",
            "prefix_space": "Prepend" in str(parts["normalizer"]),
            "unknown_id": bpe["vocab"].get(bpe.get("unk_token")),
            "fuse_unknown": bool(bpe.get("fuse_unk")),
        }
    else:
        raise UserError(
            "the tokenizer is neither byte-level BPE (gpt2, bpe:N) nor SentencePiece BPE, so a page cannot encode with"
            " it; use another --format"
        )
    vocab = bpe["vocab"] | {token["content"]: token["id"] for token in parts["added_tokens"]}
    tokens: list[str | None] = [None] * tokenizer.vocab_size
    for name, i in vocab.items():
        tokens[i] = name
    return kind | {
        "tokens": tokens,
        "merges": describe_merges(bpe),
        "special_ids": sorted(tokenizer.special_ids),
        "end_id": tokenizer.end_id,
    }


def describe_merges(bpe: Mapping[str, Any]) -> list[list[int]]:
    """Return the merges in order of rank, in runs whose tokens have consecutive ids: the id of the first token, then
    the length of each token's left part. Pairs of ids would take five times the space.
    """
    runs: list[list[int]] = []
    next_id = -1
    for left, right in parse_merges(bpe):
        merged = bpe["vocab"][left + right]
        if merged != next_id:
            runs.append([merged])
        runs[-1].append(len(left.encode("utf-16-le")) // 2)  # as JavaScript counts
        next_id = merged + 1
    return runs


def is_sentencepiece(parts: Mapping[str, Any]) -> bool:
    """Return whether spaces become "▁", nothing splits the text, and unknown characters become their bytes."""
    normalizer = parts["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    prepend = {"type": "Prepend", "prepend": SPACE_SYMBOL}
    has_steps = steps in ([replace], [prepend, replace])
    return has_steps and parts["pre_tokenizer"] is None and bool(parts["model"].get("byte_fallback"))


def pack_bits(ids: frozenset[int], n: int) -> str:
    """Return one bit for each of n ids, set for those in `ids`, as base64."""
    flags = np.zeros(n, np.uint8)
    flags[sorted(ids)] = 1
    return base64.b64encode(np.packbits(flags, bitorder="little").tobytes()).decode()
