"""Bulk encoding: the fast library is used only if it always produces the ids of `tokenizers`."""

import json
import logging
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.data import encoder
from tinystories.data.encoder import (
    PROBES,
    UNICODE_17,
    EncodedBatch,
    EncodeFn,
    make_bulk_encoder,
    make_gigatoken_encoder,
    make_tokenizers_encoder,
)
from tinystories.data.tokenizer import END, Tokenizer

ODD = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sSdmtlLvereIl0½Ⅷ١é\u0301你😀\u200d\x00.,!?-_<|endoftext|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
STORIES = st.lists(
    st.text(st.characters(codec="utf-8")) | st.text(alphabet=ODD) | st.text(alphabet="aehilnorst'  \n"), max_size=6
)


@pytest.fixture(scope="session", params=["bpe", "gpt2_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fixture: Tokenizer = request.getfixturevalue(request.param)
    return fixture


@pytest.fixture(scope="session")
def fast(tokenizer: Tokenizer) -> EncodeFn:
    """The encoder that `prepare` uses if gigatoken is installed."""
    pytest.importorskip("gigatoken")
    assert not isinstance(make_gigatoken_encoder(tokenizer), str)
    return make_bulk_encoder(tokenizer, [])


def rows(encoded: EncodedBatch) -> list[list[int]]:
    ids, counts = encoded
    assert len(ids) == counts.sum()
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(counts) else []


@given(stories=STORIES)
@settings(max_examples=300)
def test_gigatoken_gives_the_ids_of_tokenizers(fast: EncodeFn, tokenizer: Tokenizer, stories: list[str]) -> None:
    data = [story.encode() for story in stories]
    assert rows(fast(data)) == [tokenizer.encode(story) for story in stories]
    assert rows(make_tokenizers_encoder(tokenizer)(data)) == [tokenizer.encode(story) for story in stories]


def test_gigatoken_splits_like_tokenizers_in_all_blocks_that_it_is_given(bpe: Tokenizer) -> None:
    gigatoken = pytest.importorskip("gigatoken")
    split = tokenizers.Tokenizer.from_str(bpe.json_text).pre_tokenizer
    characters = [c for c in map(chr, range(0x110000)) if not UNICODE_17.match(c) and not "\ud800" <= c <= "\udfff"]
    assert len(characters) > 40_000
    for start in range(0, len(characters), 500):  # a letter, a digit and a mark before each show its class
        text = "".join(f"\na{c}\n1{c}\n!{c}\n {c}" for c in characters[start : start + 500])
        pieces = [text[first:last].encode() for _, (first, last) in split.pre_tokenize_str(text)]
        assert list(gigatoken.pretokenizer(text.encode())) == pieces


@pytest.mark.parametrize("character", ["\U00032848", "\U00016ea0", "\u088f", "\U0001e6c0"])
def test_letters_new_in_unicode_17_are_no_letters_yet(gpt2_tokenizer: Tokenizer, character: str) -> None:
    stories = [f"a cat {character}蠰", "a cat", f"{character}a{character}", "naïve"]
    got = rows(make_bulk_encoder(gpt2_tokenizer, [])([story.encode() for story in stories]))
    assert got == [gpt2_tokenizer.encode(story) for story in stories]


def test_gigatoken_agrees_on_long_runs(fast: EncodeFn, tokenizer: Tokenizer) -> None:
    stories = ["a" * 3000, " " * 3000, "\n" * 999 + "x", "ab" * 2000, "你" * 500, "!" * 700, END * 50, "\x00" * 99]
    assert rows(fast([s.encode() for s in stories])) == [tokenizer.encode(s) for s in stories]


def test_end_in_a_story_is_text_for_both(fast: EncodeFn, tokenizer: Tokenizer) -> None:
    for encode in (fast, make_tokenizers_encoder(tokenizer)):
        ids, counts = encode([f"a {END}".encode(), b"", END.encode()])
        assert tokenizer.end_id not in ids
        assert counts[1] == 0
        assert tokenizer.decode(ids.tolist()) == f"a {END}{END}"


def test_the_fast_library_is_chosen_where_it_agrees(bpe: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gigatoken")
    caplog.set_level(logging.INFO)
    make_bulk_encoder(bpe, [b"a cat"])
    assert "with gigatoken" in caplog.text


def test_one_differing_id_among_the_examples_is_enough_to_refuse_it(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = make_tokenizers_encoder(bpe)

    def wrong_about_dogs(stories: Sequence[bytes]) -> EncodedBatch:
        ids, counts = right(stories)
        return (ids + 1 if b"a dog" in stories else ids), counts

    monkeypatch.setattr(encoder, "make_gigatoken_encoder", lambda _: wrong_about_dogs)
    assert rows(make_bulk_encoder(bpe, [b"a cat"])([b"a dog"])) != [bpe.encode("a dog")]
    assert rows(make_bulk_encoder(bpe, [b"a cat", b"a dog"])([b"a dog"])) == [bpe.encode("a dog")]
    assert "different ids" in caplog.text


def test_without_gigatoken_the_ids_are_the_same(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    data = [probe.encode() for probe in PROBES] * 400  # more than one slice
    assert rows(make_bulk_encoder(bpe, [])(data)) == [bpe.encode(probe) for probe in PROBES] * 400
    assert "gigatoken is not installed" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "byte-level BPE"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "GPT-2"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "GPT-2"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GPT-2"),
    ],
)
def test_other_kinds_of_tokenizer_go_the_slow_way(bpe: Tokenizer, change: dict[str, object], reason: str) -> None:
    refusal = make_gigatoken_encoder(Tokenizer(json.dumps({**bpe.json_data, **change})))
    assert isinstance(refusal, str)
    assert reason in refusal


def test_added_words_go_the_slow_way(bpe: Tokenizer) -> None:
    word = {"id": 400, "content": "cat", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = Tokenizer(
        json.dumps({**bpe.json_data, "added_tokens": [*bpe.json_data["added_tokens"], {**word, "special": False}]})
    )
    assert tokenizer.encode("cat") == [400]
    assert "added tokens" in str(make_gigatoken_encoder(tokenizer))
