"""Convert other programs' vocabularies to tokenizer.json, and our tokenizers to tables of pieces with scores."""

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError, quoted

SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's escape for a space
MAX_PIECE_CHARS = 1024  # real pieces have up to 50 characters
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]  # names of the byte-fallback pieces
# How an added token is found in a text; all false: exactly as it is written.
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def build_sentencepiece_bpe(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    end_id: int,
    special_ids: Collection[int] = (0, 1, 2),
    *,
    add_prefix_space: bool = True,
    where: str = "the vocabulary",
) -> Tokenizer:
    """Build a SentencePiece-style BPE tokenizer: the pair whose merged piece has the highest score is merged first.

    `pieces`, `scores`: by id; a space in a piece is "▁" or " ". Characters without a piece fall back to the pieces
    <0x00> to <0xFF> of their UTF-8 bytes. The piece `end_id` is renamed to END; it and `special_ids` are never produced
    by encoding text. With `add_prefix_space`, a space is put in front of every text.

    Encoding equals `encode` in llama2.c's run.c (https://github.com/karpathy/llama2.c), with two exceptions: "▁" in a
    text is read as a space, and run.c merges overlapping pairs of the same piece from the left.

    `UserError`, prefixed with `where`, for pieces that are empty, duplicate, too long or not UTF-8, and for scores that
    are not finite.
    """
    if len(pieces) != len(scores):
        raise UserError(f"{where}: {len(pieces)} pieces but {len(scores)} scores")
    if not 0 <= end_id < len(pieces):
        raise UserError(f"{where}: the end token is id {end_id}, but there are only {len(pieces)} pieces")
    special_ids = {end_id, *special_ids}
    ids: dict[str, int] = {}
    for i, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        name = END if i == end_id else decode_piece(piece, i, where)
        if name in ids:
            raise UserError(f"{where}: pieces {ids[name]} and {i} are both {quoted(name)}")
        if not math.isfinite(score):
            raise UserError(f"{where}: the score of piece {i} is not finite")
        ids[name] = i
    text_pieces = {name: i for name, i in ids.items() if i not in special_ids and name not in BYTE_PIECES}
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>" if ids.get("<unk>", -1) in special_ids else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": list(derive_merges(text_pieces, scores)),
    }
    return Tokenizer(build_sentencepiece_json(bpe, sorted(special_ids), add_prefix_space), where)


def build_sentencepiece_json(bpe: Mapping[str, Any], special_ids: Sequence[int], add_prefix_space: bool) -> str:
    """Return the tokenizer.json around the model `bpe`: special tokens, and how spaces and bytes become pieces."""
    names = list(bpe["vocab"])
    replace_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    restore_spaces = {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
    prepend = [{"type": "Prepend", "prepend": SPACE_SYMBOL}] if add_prefix_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_prefix_space else []
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i]} | flags for i in special_ids if i < len(names)],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace_spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [restore_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": bpe,
    }
    return json.dumps(parts, ensure_ascii=False)


def decode_piece(piece: bytes, i: int, where: str) -> str:
    """Return the name of piece i, with spaces escaped."""
    try:
        name = piece.decode().replace(" ", SPACE_SYMBOL)
    except UnicodeDecodeError:
        raise UserError(f"{where}: piece {i} is not UTF-8; pass the model's tokenizer.json with --tokenizer") from None
    if not 0 < len(name) <= MAX_PIECE_CHARS:
        raise UserError(f"{where}: piece {i} has {len(name):,} characters; expected 1 to {MAX_PIECE_CHARS}")
    return name


def derive_merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yield all pairs of pieces whose concatenation is a piece, by descending score of the latter, then by id."""
    for merged in sorted(ids, key=lambda name: (-scores[ids[name]], ids[name])):
        for split_at in range(len(merged) - 1, 0, -1):
            if merged[:split_at] in ids and merged[split_at:] in ids:
                yield merged[:split_at], merged[split_at:]


def parse_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json's model as pairs; older files have "left right" strings."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def permute_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> Tokenizer:
    """Return a copy of a BPE tokenizer in which id i is renumbered to `ids[i]`."""
    parts = json.loads(tokenizer.json_text)
    added_ids = {token["content"]: token["id"] for token in parts["added_tokens"]}
    parts["model"]["vocab"] = {name: ids[i] for name, i in (parts["model"]["vocab"] | added_ids).items()}
    added_tokens = [token | {"id": ids[token["id"]]} for token in parts["added_tokens"]]
    parts["added_tokens"] = sorted(added_tokens, key=lambda token: int(token["id"]))
    return Tokenizer(json.dumps(parts, ensure_ascii=False))


def extract_pieces(tokenizer: Tokenizer) -> tuple[list[bytes], list[float]]:
    """Return pieces and scores by id, such that merging the best-scored pair first encodes as the tokenizer does.

    For SentencePiece BPE (`build_sentencepiece_bpe`) the result is exact, and special tokens keep their names. For
    byte-level BPE pieces are the bytes of each token (`<0x00>` for the zero byte, `<unk>` for special tokens and unused
    ids); the encoding is approximate, since a table of pieces has no pre-tokenizer. `UserError` for other tokenizers.
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
            "the tokenizer is neither byte-level BPE (gpt2, bpe:N) nor SentencePiece BPE, so the format cannot"
            " represent it; use --format hf"
        )
    for token in tokenizer.json_data["added_tokens"]:
        names[token["id"]] = token["content"]
    pieces = [name.replace(SPACE_SYMBOL, " ").encode() or b"<unk>" for name in names]
    return pieces, infer_id_scores(names, tokenizer) or rank_scores


def infer_id_scores(names: list[str], tokenizer: Tokenizer) -> list[float] | None:
    """Return the scores that SentencePiece gives BPE pieces (0, -1, -2, ... by id); None if merges contradict them."""
    special = tokenizer.special_ids
    text_pieces = {name: i for i, name in enumerate(names) if name and i not in special and name not in BYTE_PIECES}
    count = itertools.count()
    scores = [-float(next(count)) if text_pieces.get(name) == i else 0.0 for i, name in enumerate(names)]
    return scores if list(derive_merges(text_pieces, scores)) == parse_merges(tokenizer.json_data["model"]) else None
