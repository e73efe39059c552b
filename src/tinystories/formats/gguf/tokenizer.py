"""Write our tokenizers to GGUF metadata, and read those of GGUF files.

llama.cpp calls byte-level BPE model "gpt2", with a pre-tokenizer named by the key "pre", and SentencePiece BPE "llama".
"""

import json
from pathlib import Path
from typing import Any

from tinystories.data.build_tokenizer import new_byte_level_bpe
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError, quoted
from tinystories.formats.end_token import adapt_tokenizer, read_tokenizer_text, set_end_token
from tinystories.formats.gguf.reader import GgufFile
from tinystories.formats.tokenizer_conversion import (
    BYTE_PIECES,
    TOKEN_FLAGS,
    build_sentencepiece_bpe,
    extract_pieces,
    parse_merges,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
PRE_TOKENIZER = "gpt-2"
# Types of normalizers that "llama" implements: spaces become "▁", optionally with one in front of the text.
SPACE_NORMALIZERS = ({"Replace"}, {"Prepend", "Replace"})


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Write the tokenizer to a `gguf.GGUFWriter`, with END before every text.

    Ids below `vocab_size` that the tokenizer does not have become unused tokens. `UserError` if llama.cpp does not
    support the tokenizer.
    """
    tokenizer_model = select_tokenizer_model(tokenizer)
    model = tokenizer.json_data["model"]
    added_tokens = {token["id"]: token for token in tokenizer.json_data["added_tokens"]}
    names = {i: name for name, i in model["vocab"].items()} | {i: token["content"] for i, token in added_tokens.items()}
    token_types = [NORMAL if i in names else UNUSED for i in range(vocab_size)]
    for i, name in names.items():
        if i in added_tokens and not added_tokens[i]["special"]:
            token_types[i] = USER_DEFINED
        elif i in added_tokens:
            token_types[i] = UNKNOWN if name == model.get("unk_token") else CONTROL
        elif tokenizer_model == "llama" and name in BYTE_PIECES:
            token_types[i] = BYTE
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(token_types)
    if tokenizer_model == "gpt2":
        writer.add_tokenizer_pre(PRE_TOKENIZER)
        if merges := [" ".join(pair) for pair in parse_merges(model)]:
            writer.add_token_merges(merges)
    else:
        scores = extract_pieces(tokenizer)[1]
        writer.add_token_scores(scores + [0.0] * (vocab_size - len(scores)))
        writer.add_add_space_prefix("Prepend" in normalizer_types(tokenizer))
    for add_token_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id):
        add_token_id(tokenizer.end_id)
    writer.add_add_bos_token(True)


def select_tokenizer_model(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for the kind of tokenizer, "gpt2" or "llama"; `UserError` if it supports neither."""
    model, pre_tokenizer = tokenizer.json_data["model"], tokenizer.json_data["pre_tokenizer"]
    user_tokens = [token for token in tokenizer.json_data["added_tokens"] if not token["special"]]
    if model["type"] == "BPE" and not any(token[flag] for token in user_tokens for flag in TOKEN_FLAGS):
        if tokenizer.is_lossless and pre_tokenizer.get("use_regex", True) and not model.get("ignore_merges"):
            return "gpt2"
        has_spaces = normalizer_types(tokenizer) in SPACE_NORMALIZERS and pre_tokenizer is None
        if model.get("byte_fallback") and has_spaces and not user_tokens:
            return "llama"
    raise UserError(
        "llama.cpp does not support this model's tokenizer: GGUF supports gpt2, bpe:N, and SentencePiece BPE with byte"
        " fallback; use --format hf"
    )


def normalizer_types(tokenizer: Tokenizer) -> set[str]:
    """Return the types of the normalizers in the tokenizer.json."""
    normalizer = tokenizer.json_data["normalizer"] or {}
    return {part["type"] for part in normalizer.get("normalizers", [normalizer]) if part}


def read_tokenizer(file: GgufFile, tokenizer_path: Path | None, vocab_size: int) -> Tokenizer:
    """Read the file's tokenizer, or the tokenizer.json at `tokenizer_path` (`gpt2`: GPT-2's).

    END becomes the name of the file's BOS token, or of its EOS token if it has no BOS.
    """
    key = "tokenizer.ggml.{}_token_id"
    if tokenizer_path is not None:
        keys = (key.format(name) for name in ("bos", "eos"))
        candidates = [(name, file.metadata[name]) for name in keys if name in file.metadata]
        return adapt_tokenizer(read_tokenizer_text(tokenizer_path), candidates, vocab_size, str(tokenizer_path))
    end_id = file.get(key.format("bos"), int, file.get(key.format("eos"), int, -1))
    tokenizer_model = file.get("tokenizer.ggml.model", str, "none")
    pre_tokenizer = file.get("tokenizer.ggml.pre", str, "none") if tokenizer_model == "gpt2" else ""
    if (tokenizer_model, pre_tokenizer) not in (("gpt2", PRE_TOKENIZER), ("llama", "")):
        description = quoted(tokenizer_model) + (f" with pre-tokenizer {quoted(pre_tokenizer)}" * bool(pre_tokenizer))
        raise UserError(
            f"{file.path}: its tokenizer ({description}) is not supported, only gpt2 with pre-tokenizer"
            f" {PRE_TOKENIZER}, and llama; pass the model's tokenizer.json with --tokenizer"
        )
    n_tokens = len(file.get("tokenizer.ggml.tokens", list))
    token_types = file.get_numbers("tokenizer.ggml.token_type") or [NORMAL] * n_tokens
    if len(token_types) != n_tokens:
        raise file.error(f"{n_tokens:,} tokens but {len(token_types):,} token types")
    while token_types and token_types[-1] == UNUSED:
        token_types.pop()
    if not 0 <= end_id < len(token_types):
        raise file.error(f"its BOS or EOS token is {end_id}, but there are only {len(token_types):,} tokens")
    build = build_sentencepiece_tokenizer if tokenizer_model == "llama" else build_byte_level_tokenizer
    return build(file, token_types, end_id)


def build_byte_level_tokenizer(file: GgufFile, token_types: list[int], end_id: int) -> Tokenizer:
    """Build a byte-level BPE tokenizer with GPT-2's pre-tokenizer, of the first `len(token_types)` tokens."""
    vocab: dict[str, int] = {}
    names = file.get_texts("tokenizer.ggml.tokens")
    for i, token_type in enumerate(token_types):
        if token_type != UNUSED and vocab.setdefault(names[i], i) != i:
            raise file.error(f"tokens {vocab[names[i]]} and {i} are both {quoted(names[i])}")
    merges = [line.split(" ") for line in file.get_texts("tokenizer.ggml.merges", [])]
    if not all(len(pair) == 2 for pair in merges):
        raise file.error("a merge does not have two parts")
    parts = json.loads(new_byte_level_bpe({}, []).to_str())
    parts["model"] |= {"vocab": vocab, "merges": merges}
    parts["added_tokens"] = [
        {"id": i, "content": name, "special": token_types[i] != USER_DEFINED, **dict.fromkeys(TOKEN_FLAGS, False)}
        for name, i in vocab.items()
        if token_types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return set_end_token(json.dumps(parts, ensure_ascii=False), end_id, f"{file.path}: its vocabulary")


def build_sentencepiece_tokenizer(file: GgufFile, token_types: list[int], end_id: int) -> Tokenizer:
    """Build a SentencePiece BPE tokenizer of the first `len(token_types)` tokens."""
    if USER_DEFINED in token_types:
        raise UserError(
            f"{file.path}: its vocabulary has user-defined tokens, which are not supported; pass the model's"
            " tokenizer.json with --tokenizer"
        )
    pieces = file.get("tokenizer.ggml.tokens", list)[: len(token_types)]
    scores = (file.get_numbers("tokenizer.ggml.scores") or [])[: len(token_types)]
    special_ids = [i for i, token_type in enumerate(token_types) if token_type in (UNKNOWN, CONTROL, UNUSED)]
    add_prefix_space = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    return build_sentencepiece_bpe(
        pieces, scores, end_id, special_ids, add_prefix_space=add_prefix_space, where=str(file.path)
    )
