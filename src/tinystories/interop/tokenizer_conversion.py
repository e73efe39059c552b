"""Other programs' vocabularies as tokenizer.json, and ours as tables of pieces with scores."""

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tinystories.data.tokenizer import END, Tokenizer, sanitize
from tinystories.errors import UserError, quoted

SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
MAX_PIECE_CHARS = 1024  # characters of a piece; real ones have up to 50
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]  # names of the pieces that stand for one byte each
MALFORMED_ERRORS = (
    TypeError,
    KeyError,
    AttributeError,
    ValueError,
    IndexError,
    RecursionError,
)  # what odd JSON may lead to


def build_sentencepiece_bpe(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    end_id: int,
    special_ids: Collection[int] = (0, 1, 2),
    *,
    add_prefix_space: bool = True,
    where: str = "the vocabulary",
) -> Tokenizer:
    """A BPE tokenizer of sentencepiece's kind: pieces by id, the pair whose whole has the best score is merged first.

    Characters that are no piece become the pieces <0x00> to <0xFF> of their bytes. A space is "▁" (or " " in `pieces`);
    `prefix`: one is put before every text. The piece `end_id` becomes END; it and the ids of `special` never come from
    text. The ids are those of `encode` in llama2.c's run.c (https://github.com/karpathy/llama2.c), but for "▁" in a
    text, which reads as a space, and for overlapping pairs of the same whole, which run.c takes from the left.

    `UserError` names `where`, for pieces that are empty, twice there, too long or not UTF-8, and for scores that are
    no numbers.
    """
    if len(pieces) != len(scores):
        raise UserError(f"{where}: {len(pieces)} pieces but {len(scores)} scores")
    if not 0 <= end_id < len(pieces):
        raise UserError(f"{where}: the end of a story is id {end_id}, but there are only {len(pieces)} pieces")
    special_ids = {end_id, *special_ids}
    ids: dict[str, int] = {}
    for i, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        name = END if i == end_id else decode_piece(piece, i, where)
        if name in ids:
            raise UserError(f"{where}: pieces {ids[name]} and {i} are both {quoted(name)}")
        if not math.isfinite(score):
            raise UserError(f"{where}: the score of piece {i} is not a number")
        ids[name] = i
    names = list(ids)
    text_pieces = {name: i for name, i in ids.items() if i not in special_ids and name not in BYTE_PIECES}
    unk_token = "<unk>" if ids.get("<unk>", -1) in special_ids else None
    space_normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}]
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i in sorted(special_ids)
            if i < len(names)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": ([{"type": "Prepend", "prepend": SPACE_SYMBOL}] if add_prefix_space else [])
            + space_normalizers,
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(derive_merges(text_pieces, scores)),
        },
    }
    return Tokenizer(json.dumps(parts, ensure_ascii=False), where)


def decode_piece(piece: bytes, i: int, where: str) -> str:
    try:
        name = piece.decode().replace(" ", SPACE_SYMBOL)
    except UnicodeDecodeError:
        raise UserError(f"{where}: piece {i} is not UTF-8; give the model's tokenizer.json by --tokenizer") from None
    if not 0 < len(name) <= MAX_PIECE_CHARS:
        raise UserError(f"{where}: piece {i} has {len(name):,} characters; expected 1 to {MAX_PIECE_CHARS}")
    return name


def derive_merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces whose whole is a piece, the best score of the whole first."""
    for merged in sorted(ids, key=lambda name: (-scores[ids[name]], ids[name])):
        for split_at in range(len(merged) - 1, 0, -1):
            if merged[:split_at] in ids and merged[split_at:] in ids:
                yield merged[:split_at], merged[split_at:]


def set_end_token(text: str, end_id: int, where: str) -> Tokenizer:
    """The tokenizer of another program's tokenizer.json, with END as the name of its token `end_id`.

    If END named another token, that one takes the name that END leaves free. What it would put around a text (its
    post-processor) is dropped. `UserError` names `where`, for files that are no tokenizer or have no such id.
    """
    try:
        parts = json.loads(text)
        old_name = rename_end_token(parts, end_id)
        added_tokens = {token["id"]: token for token in parts["added_tokens"]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added_tokens[end_id] = added_tokens.get(end_id, flags) | {"id": end_id, "content": END, "special": True}
        parts["added_tokens"] = [added_tokens[i] for i in sorted(added_tokens)]
        parts["post_processor"] = None
        tokenizer = Tokenizer(json.dumps(parts, ensure_ascii=False), where)
    except MALFORMED_ERRORS as error:
        raise UserError(f"{where} is not a Hugging Face tokenizer: {sanitize(error)}") from None
    if old_name is None or tokenizer.end_id != end_id:
        raise UserError(f"{where}: there is no token {end_id}, which should end its stories")
    return tokenizer


def rename_end_token(parts: dict[str, Any], end_id: int) -> str | None:
    """Give the token of that id the name END, and END's the old one; the old name, None where there is no such id."""
    model, added_tokens = parts["model"], parts["added_tokens"]
    vocab = model["vocab"]
    is_list = isinstance(vocab, list)  # Unigram: [piece, score] by id
    names = {i: pair[0] for i, pair in enumerate(vocab)} if is_list else {i: name for name, i in vocab.items()}
    names |= {token["id"]: token["content"] for token in added_tokens}
    old_name = names.get(end_id)
    if old_name in (None, END):
        return old_name
    if any(old_name in (left, right, left + right) for left, right in parse_merges(model)):
        raise ValueError(f"its token {end_id} is {quoted(old_name)}, part of a text; it cannot end a story")
    renames = {old_name: END, END: old_name}
    for token in added_tokens:
        token["content"] = renames.get(token["content"], token["content"])
    if is_list:
        model["vocab"] = [[renames.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {renames.get(name, name): i for name, i in vocab.items()}
    if "unk_token" in model:
        model["unk_token"] = renames.get(model["unk_token"], model["unk_token"])
    return old_name


def parse_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a tokenizer.json's model; older files have them as one string each."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def permute_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> Tokenizer:
    """The same BPE tokenizer with `ids[i]` for each id i."""
    parts = json.loads(tokenizer.json_text)
    added_ids = {token["content"]: token["id"] for token in parts["added_tokens"]}
    parts["model"]["vocab"] = {name: ids[i] for name, i in (parts["model"]["vocab"] | added_ids).items()}
    added_tokens = [token | {"id": ids[token["id"]]} for token in parts["added_tokens"]]
    parts["added_tokens"] = sorted(added_tokens, key=lambda token: int(token["id"]))
    return Tokenizer(json.dumps(parts, ensure_ascii=False))


def extract_pieces(tokenizer: Tokenizer) -> tuple[list[bytes], list[float]]:
    """What each id stands for, and scores by which merging the best pair first encodes as the tokenizer does.

    Of sentencepiece's kind (see `sentencepiece`) the result is exact; special tokens keep their names. Byte-level BPE
    gives the bytes of each token, `<0x00>` for the byte zero; it is only as good as encoding without a split into
    words can be. Special tokens and unused ids are `<unk>` there. `UserError` where the tokenizer is neither.
    """
    model = tokenizer.json_data["model"]
    names = [""] * tokenizer.vocab_size
    for name, i in (model.get("vocab") or {}).items() if model["type"] == "BPE" else ():
        names[i] = name
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(parse_merges(model)):
        ranks.setdefault(left + right, rank)
    rank_scores = [-float(ranks.get(name, 0)) for name in names]
    if tokenizer.is_lossless and model["type"] == "BPE":
        token_bytes = tokenizer.token_bytes
        return [{b"": b"<unk>", b"\0": b"<0x00>"}.get(piece, piece) for piece in token_bytes], rank_scores
    if model["type"] != "BPE" or not model.get("byte_fallback") or tokenizer.json_data["pre_tokenizer"]:
        raise UserError(
            "the tokenizer is neither byte-level BPE (gpt2, bpe:N) nor of sentencepiece's kind; no table of pieces"
            " can say what it does"
        )
    for token in tokenizer.json_data["added_tokens"]:
        names[token["id"]] = token["content"]
    pieces = [name.replace(SPACE_SYMBOL, " ").encode() or b"<unk>" for name in names]
    return pieces, infer_id_scores(names, tokenizer) or rank_scores


def infer_id_scores(names: list[str], tokenizer: Tokenizer) -> list[float] | None:
    """The scores that sentencepiece gives its BPE pieces: 0, -1, -2... by id; None where the merges say otherwise."""
    special = tokenizer.special_ids
    text_pieces = {name: i for i, name in enumerate(names) if name and i not in special and name not in BYTE_PIECES}
    count = itertools.count()
    scores = [-float(next(count)) if text_pieces.get(name) == i else 0.0 for i, name in enumerate(names)]
    return scores if list(derive_merges(text_pieces, scores)) == parse_merges(tokenizer.json_data["model"]) else None
