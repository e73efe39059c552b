"""Our tokenizers in a GGUF file's metadata, and its vocabularies as ours.

llama.cpp knows byte-level BPE as model "gpt2", whose split into words "pre" names, and sentencepiece's as "llama".
"""

import json
from pathlib import Path
from typing import Any

from tinystories.data.tokenizer import Tokenizer
from tinystories.data.vocabulary import byte_level
from tinystories.errors import UserError, shown
from tinystories.interop.gguf_file import GgufFile
from tinystories.interop.vocabulary import BYTES, merges_in, pieces_of, sentencepiece, with_end

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPLIT = "gpt-2"
SPACES = ({"Replace"}, {"Prepend", "Replace"})  # what "llama" does to a text before it is split


def add_to(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the tokenizer to a `gguf.GGUFWriter`, with END before every text.

    Ids up to `vocab_size` that the tokenizer does not have become unused tokens. `UserError` where llama.cpp has no
    such tokenizer.
    """
    kind = kind_of(tokenizer)
    model, added = tokenizer.parts["model"], {token["id"]: token for token in tokenizer.parts["added_tokens"]}
    names = {i: name for name, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    types = []
    for i in range(vocab_size):
        if i in added:
            special = UNKNOWN if names[i] == model.get("unk_token") else CONTROL
            types.append(special if added[i]["special"] else USER_DEFINED)
        else:
            types.append(UNUSED if i not in names else BYTE if kind == "llama" and names[i] in BYTES else NORMAL)
    writer.add_tokenizer_model(kind)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_tokenizer_pre(SPLIT)
        if merges := [" ".join(pair) for pair in merges_in(model)]:
            writer.add_token_merges(merges)
    else:
        scores = pieces_of(tokenizer)[1]
        writer.add_token_scores(scores + [0.0] * (vocab_size - len(scores)))
        writer.add_add_space_prefix("Prepend" in normalizers(tokenizer))
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id):
        add(tokenizer.end_id)
    writer.add_add_bos_token(True)


def kind_of(tokenizer: Tokenizer) -> str:
    """`gpt2` or `llama`."""
    model, split = tokenizer.parts["model"], tokenizer.parts["pre_tokenizer"]
    kept = [token for token in tokenizer.parts["added_tokens"] if not token["special"]]
    whole = not any(token[flag] for token in kept for flag in ("lstrip", "rstrip", "single_word", "normalized"))
    if model["type"] == "BPE" and whole:
        if tokenizer.lossless and split.get("use_regex", True) and not model.get("ignore_merges"):
            return "gpt2"
        if model.get("byte_fallback") and split is None and normalizers(tokenizer) in SPACES and not kept:
            return "llama"
    raise UserError(
        "llama.cpp has no tokenizer like this model's: a GGUF file can hold gpt2, bpe:N, and sentencepiece's BPE with"
        " bytes; use --format hf"
    )


def normalizers(tokenizer: Tokenizer) -> set[str]:
    """Types of what is done to a text before anything else."""
    found = tokenizer.parts["normalizer"] or {}
    return {part["type"] for part in found.get("normalizers", [found]) if part}


def read(file: GgufFile, given: Path | None) -> Tokenizer:
    """The file's vocabulary, or the tokenizer.json `given`; END is what stands before a text, else what ends it."""
    key = "tokenizer.ggml.{}_token_id"
    end_id = file.get(key.format("bos"), int, file.get(key.format("eos"), int, -1))
    if given is not None:
        tokenizer = Tokenizer.load(given)
        return tokenizer if end_id < 0 else with_end(tokenizer.text, end_id, str(given))
    kind = file.get("tokenizer.ggml.model", str, "none")
    split = file.get("tokenizer.ggml.pre", str, "none")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and split != SPLIT):
        which = f"{shown(kind)}, split as {shown(split)}" if kind == "gpt2" else shown(kind)
        raise UserError(
            f"{file.path}: its vocabulary ({which}) is none of ours (gpt2 split as {SPLIT}, llama); give the model's"
            " tokenizer.json by --tokenizer"
        )
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: {len(tokens):,} tokens but {len(types):,} types of tokens; convert it again")
    while types and types[-1] == UNUSED:
        tokens, types = tokens[:-1], types[:-1]
    if not 0 <= end_id < len(tokens):
        raise UserError(f"{file.path}: token {end_id} should end its stories, but there are {len(tokens):,} tokens")
    if kind == "llama":
        return pieces(file, tokens, types, end_id)
    return words(file, tokens, types, end_id)


def words(file: GgufFile, tokens: list[bytes], types: list[int], end_id: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's split."""
    vocab: dict[str, int] = {}
    for i, name in enumerate(decoded(file, tokens, "token")):
        if types[i] != UNUSED and vocab.setdefault(name, i) != i:
            raise UserError(f"{file.path}: tokens {vocab[name]} and {i} are both {shown(name)}; convert it again")
    merges = [line.split(" ") for line in decoded(file, file.get("tokenizer.ggml.merges", list, []), "merge")]
    if not all(len(pair) == 2 for pair in merges):
        raise UserError(f"{file.path}: a merge is not of two parts; convert it again")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    parts = json.loads(byte_level({}, []).to_str())
    parts["model"] |= {"vocab": vocab, "merges": merges}
    parts["added_tokens"] = [
        {"id": i, "content": name, "special": types[i] != USER_DEFINED, **flags}
        for name, i in vocab.items()
        if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return with_end(json.dumps(parts, ensure_ascii=False), end_id, f"{file.path}: its vocabulary")


def pieces(file: GgufFile, tokens: list[bytes], types: list[int], end_id: int) -> Tokenizer:
    """BPE of sentencepiece's kind."""
    if USER_DEFINED in types:
        raise UserError(
            f"{file.path}: its vocabulary has tokens of its user's, which come before all others; give the model's"
            " tokenizer.json by --tokenizer"
        )
    scores = file.numbers("tokenizer.ggml.scores") or []
    special = [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, UNUSED)]
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    return sentencepiece(tokens, scores[: len(tokens)], end_id, special, prefix=prefix, where=str(file.path))


def decoded(file: GgufFile, texts: list[bytes], what: str) -> list[str]:
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError:
        raise UserError(f"{file.path}: a {what} of its vocabulary is not UTF-8; convert it again") from None
