"""Other programs' vocabularies as tokenizer.json, and ours as tables of pieces with scores."""

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tinystories.data.tokenizer import END, Tokenizer, one_line
from tinystories.errors import UserError, shown

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
LONGEST = 1024  # characters of a piece; real ones have up to 50
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # names of the pieces that stand for one byte each
DAMAGE = (TypeError, KeyError, AttributeError, ValueError, IndexError, RecursionError)  # what odd JSON may lead to


def sentencepiece(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    end_id: int,
    special: Collection[int] = (0, 1, 2),
    *,
    prefix: bool = True,
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
    special = {end_id, *special}
    ids: dict[str, int] = {}
    for i, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        name = END if i == end_id else name_of(piece, i, where)
        if name in ids:
            raise UserError(f"{where}: pieces {ids[name]} and {i} are both {shown(name)}")
        if not math.isfinite(score):
            raise UserError(f"{where}: the score of piece {i} is not a number")
        ids[name] = i
    names = list(ids)
    plain = {name: i for name, i in ids.items() if i not in special and name not in BYTES}
    unknown = "<unk>" if ids.get("<unk>", -1) in special else None
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i in sorted(special)
            if i < len(names)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": ([{"type": "Prepend", "prepend": SPACE}] if prefix else []) + spaces,
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(merges_of(plain, scores)),
        },
    }
    return Tokenizer(json.dumps(parts, ensure_ascii=False), where)


def name_of(piece: bytes, i: int, where: str) -> str:
    try:
        name = piece.decode().replace(" ", SPACE)
    except UnicodeDecodeError:
        raise UserError(f"{where}: piece {i} is not UTF-8; give the model's tokenizer.json by --tokenizer") from None
    if not 0 < len(name) <= LONGEST:
        raise UserError(f"{where}: piece {i} has {len(name):,} characters; expected 1 to {LONGEST}")
    return name


def merges_of(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces whose whole is a piece, the best score of the whole first."""
    for whole in sorted(ids, key=lambda name: (-scores[ids[name]], ids[name])):
        for cut in range(len(whole) - 1, 0, -1):
            if whole[:cut] in ids and whole[cut:] in ids:
                yield whole[:cut], whole[cut:]


def with_end(text: str, end_id: int, where: str) -> Tokenizer:
    """The tokenizer of another program's tokenizer.json, with END as the name of its token `end_id`.

    If END named another token, that one takes the name that END leaves free. What it would put around a text (its
    post-processor) is dropped. `UserError` names `where`, for files that are no tokenizer or have no such id.
    """
    try:
        parts = json.loads(text)
        former = rename(parts, end_id)
        added = {token["id"]: token for token in parts["added_tokens"]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[end_id] = added.get(end_id, flags) | {"id": end_id, "content": END, "special": True}
        parts["added_tokens"] = [added[i] for i in sorted(added)]
        parts["post_processor"] = None
        tokenizer = Tokenizer(json.dumps(parts, ensure_ascii=False), where)
    except DAMAGE as error:
        raise UserError(f"{where} is not a Hugging Face tokenizer: {one_line(error)}") from None
    if former is None or tokenizer.end_id != end_id:
        raise UserError(f"{where}: there is no token {end_id}, which should end its stories")
    return tokenizer


def rename(parts: dict[str, Any], end_id: int) -> str | None:
    """Give the token of that id the name END, and END's the old one; the old name, None where there is no such id."""
    model, added = parts["model"], parts["added_tokens"]
    vocab = model["vocab"]
    listed = isinstance(vocab, list)  # Unigram: [piece, score] by id
    names = {i: pair[0] for i, pair in enumerate(vocab)} if listed else {i: name for name, i in vocab.items()}
    names |= {token["id"]: token["content"] for token in added}
    former = names.get(end_id)
    if former in (None, END):
        return former
    if any(former in (left, right, left + right) for left, right in merges_in(model)):
        raise ValueError(f"its token {end_id} is {shown(former)}, part of a text; it cannot end a story")
    new = {former: END, END: former}
    for token in added:
        token["content"] = new.get(token["content"], token["content"])
    if listed:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {new.get(name, name): i for name, i in vocab.items()}
    if "unk_token" in model:
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    return former


def merges_in(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a tokenizer.json's model; older files have them as one string each."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def relabelled(tokenizer: Tokenizer, ids: Sequence[int]) -> Tokenizer:
    """The same BPE tokenizer with `ids[i]` for each id i."""
    parts = json.loads(tokenizer.text)
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    parts["model"]["vocab"] = {name: ids[i] for name, i in (parts["model"]["vocab"] | added).items()}
    tokens = [token | {"id": ids[token["id"]]} for token in parts["added_tokens"]]
    parts["added_tokens"] = sorted(tokens, key=lambda token: int(token["id"]))
    return Tokenizer(json.dumps(parts, ensure_ascii=False))


def pieces_of(tokenizer: Tokenizer) -> tuple[list[bytes], list[float]]:
    """What each id stands for, and scores by which merging the best pair first encodes as the tokenizer does.

    Of sentencepiece's kind (see `sentencepiece`) the result is exact; special tokens keep their names. Byte-level BPE
    gives the bytes of each token, `<0x00>` for the byte zero; it is only as good as encoding without a split into
    words can be. Special tokens and unused ids are `<unk>` there. `UserError` where the tokenizer is neither.
    """
    model = tokenizer.parts["model"]
    names = [""] * tokenizer.vocab_size
    for name, i in (model.get("vocab") or {}).items() if model["type"] == "BPE" else ():
        names[i] = name
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges_in(model)):
        ranks.setdefault(left + right, rank)
    by_rank = [-float(ranks.get(name, 0)) for name in names]
    if tokenizer.lossless and model["type"] == "BPE":
        table = tokenizer.bytes_of
        return [{b"": b"<unk>", b"\0": b"<0x00>"}.get(piece, piece) for piece in table], by_rank
    if model["type"] != "BPE" or not model.get("byte_fallback") or tokenizer.parts["pre_tokenizer"]:
        raise UserError(
            "the tokenizer is neither byte-level BPE (gpt2, bpe:N) nor of sentencepiece's kind; no table of pieces"
            " can say what it does"
        )
    for token in tokenizer.parts["added_tokens"]:
        names[token["id"]] = token["content"]
    pieces = [name.replace(SPACE, " ").encode() or b"<unk>" for name in names]
    return pieces, scores_by_id(names, tokenizer) or by_rank


def scores_by_id(names: list[str], tokenizer: Tokenizer) -> list[float] | None:
    """The scores that sentencepiece gives its BPE pieces: 0, -1, -2... by id; None where the merges say otherwise."""
    special = tokenizer.special_ids
    plain = {name: i for i, name in enumerate(names) if name and i not in special and name not in BYTES}
    count = itertools.count()
    scores = [-float(next(count)) if plain.get(name) == i else 0.0 for i, name in enumerate(names)]
    return scores if list(merges_of(plain, scores)) == merges_in(tokenizer.parts["model"]) else None
