"""The page's tokenizer gives the ids of Hugging Face's, on text of every kind, and the same text back."""

import codecs
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_helpers import sentencepiece_tokenizer
from page_helpers import needs_node, run_script

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats.html.model_data import describe_tokenizer
from tinystories.formats.tokenizer_conversion import parse_merges

SCRIPT = """
function answer({ tokenizer: data, texts, streams }) {
  const tokenizer = new Tokenizer(data);
  const decode = (ids) => {
    const detokenizer = new Detokenizer(tokenizer);
    return ids.map((id) => detokenizer.add(id)).join('') + detokenizer.finish();
  };
  return {
    ids: texts.map((text) => tokenizer.encode(text)),
    bytes: data.tokens.map((_, id) => Array.from(tokenizer.tokenBytes(id))),
    merges: Array.from(tokenizer.ranks, ([pair, [rank, id]]) => [...pair.split(' ').map(Number), id]),
    texts: streams.map(decode),
  };
}
"""
TEXTS = [
    "",
    " ",
    "Once upon a time, there was a little girl named Lily.",
    "\"Hi!\" she said.\n\n\"I'm Tom. We'll play, don't they've YOU'RE it's?\"  Two  spaces   three.\n",
    "  leading\tand trailing \r\n  \n ",
    "<|endoftext|> and <unk> <s> <0x41> ▁ are text",
    "naïve café – “quotes” … ½ ² 3.14 １２３ Ⅷ",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪 and zero\u200bwidth",
    "日本語のテキスト, العربية, हिन्दी, ไทย, 한국어",
    "\ufeffBOM \u0085NEL \u00a0NBSP \u2003EM \u180eMVS \u3000IDEO",
    "\x00\x01\x1f\x7f controls \u2028 \u2029",
    "á combining, 𝒜𝓁𝓁 astral 𐍈",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa the the theandand  the",
]


def random_texts(n: int) -> list[str]:
    """Random characters of all planes that this Python knows, among letters and spaces."""
    rng = np.random.default_rng(5)
    texts = []
    for _ in range(n):
        codes = np.where(
            rng.random(40) < 0.4,
            rng.integers(32, 127, 40),
            rng.choice([0x250, 0x3000, 0x10000, 0x1FAFF]) * rng.random(40),
        )
        # Letters that are newer than a library's tables are letters to one and signs to the other.
        texts.append("".join(c for c in map(chr, codes.astype(int)) if unicodedata.category(c) not in ("Cn", "Cs")))
    return texts


def tokenizers(sample_data: Path) -> dict[str, Tokenizer]:
    return {
        "bundled": Tokenizer.load(BUNDLED_MODEL),
        "bpe:400": Tokenizer.load(sample_data),
        "sentencepiece": sentencepiece_tokenizer(),
        "sentencepiece without prefix": sentencepiece_tokenizer(add_prefix_space=False),
    }


def expected_merges(tokenizer: Tokenizer) -> list[list[int]]:
    """Left, right and merged id of each merge, in order of rank."""
    model = tokenizer.json_data["model"]
    vocab = model["vocab"]
    return [[vocab[left], vocab[right], vocab[left + right]] for left, right in parse_merges(model)]


@needs_node
@pytest.mark.parametrize("name", ["bundled", "bpe:400", "sentencepiece", "sentencepiece without prefix"])
def test_ids_and_texts_are_those_of_the_program(sample_data: Path, name: str) -> None:
    tokenizer = tokenizers(sample_data)[name]
    texts = TEXTS + random_texts(200)
    rng = np.random.default_rng(6)
    streams = [rng.integers(0, tokenizer.vocab_size, 30).tolist() for _ in range(200)]
    streams += [tokenizer.encode(text) for text in TEXTS]
    answer = run_script(SCRIPT, {"tokenizer": describe_tokenizer(tokenizer), "texts": texts, "streams": streams})
    for text, ids in zip(texts, answer["ids"], strict=True):
        assert ids == tokenizer.encode(text), text
    assert answer["bytes"] == [list(data) for data in tokenizer.token_bytes]
    assert answer["merges"] == expected_merges(tokenizer)
    for ids, text in zip(streams, answer["texts"], strict=True):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(tokenizer.token_bytes[i]) for i in ids]
        assert text == "".join(pieces) + decoder.decode(b"", final=True)


@needs_node
def test_words_and_ties_are_those_of_the_original_library() -> None:
    """A merge that crosses the border of words shows it: U+0085 is white space there and U+FEFF is not, unlike in
    JavaScript. Of equal pairs that overlap, the left one is merged."""
    parts: dict[str, Any] = json.loads(Tokenizer.load(BUNDLED_MODEL).json_text)
    for i, (left, right) in enumerate((("Ġ", "Â"), ("!", "ï"), ("q", "q"))):
        parts["model"]["vocab"][left + right] = 4096 + i
        parts["model"]["merges"].append([left, right])
    tokenizer = Tokenizer(json.dumps(parts))
    texts = ["a \x85b", "a \xa0b", "a \xa9b", "a!\ufeffb", "a!\u3000b", "!\u180e", "qqq", "aqqqqqb"]
    for token, text in ((4096, "a \xa9b"), (4097, "a!\ufeffb"), (4098, "qqq")):
        assert token in tokenizer.encode(text)
    data = {"tokenizer": describe_tokenizer(tokenizer), "texts": texts, "streams": []}
    assert run_script(SCRIPT, data)["ids"] == [tokenizer.encode(text) for text in texts]


@needs_node
def test_unknown_characters_without_bytes_become_the_unknown_token() -> None:
    """One for neighbors, as fuse_unk says; and each its own where it is off."""
    for fuse in (True, False):
        parts: dict[str, Any] = json.loads(sentencepiece_tokenizer().json_text)
        vocab = parts["model"]["vocab"]
        parts["model"] |= {"fuse_unk": fuse, "unk_token": "<unk>"}
        parts["model"]["vocab"] = {name: i for name, i in vocab.items() if name != "<0xF0>"}
        tokenizer = Tokenizer(json.dumps(parts))
        texts = ["a 🙂🙂 b 🙂", "🙂", "éa"]
        data = {"tokenizer": describe_tokenizer(tokenizer), "texts": texts, "streams": []}
        assert run_script(SCRIPT, data)["ids"] == [tokenizer.encode(text) for text in texts]


def test_other_tokenizers_are_refused() -> None:
    parts = json.loads(Tokenizer.load(BUNDLED_MODEL).json_text)
    no_regex = parts | {"pre_tokenizer": parts["pre_tokenizer"] | {"use_regex": False}}
    added = {"id": 4096, "content": "zzz", "special": False, "single_word": False} | dict.fromkeys(
        ("lstrip", "rstrip", "normalized"), False
    )
    with_added = parts | {"added_tokens": [*parts["added_tokens"], added]}
    pieces = json.loads(sentencepiece_tokenizer().json_text)
    split = pieces | {"pre_tokenizer": {"type": "Whitespace"}}
    with_suffix = pieces | {"model": pieces["model"] | {"end_of_word_suffix": "</w>"}}
    for changed in (no_regex, with_added, split, with_suffix):
        with pytest.raises(UserError, match="neither byte-level BPE"):
            describe_tokenizer(Tokenizer(json.dumps(changed)))
