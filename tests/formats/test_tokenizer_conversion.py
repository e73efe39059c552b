"""Vocabularies of other programs encode as those programs do, and survive the way there and back."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_c import decode, encode, peer, read_table

from tinystories.data.build_tokenizer import train_bpe
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.formats.end_token import set_end_token
from tinystories.formats.tokenizer_conversion import BYTE_PIECES, build_sentencepiece_bpe, extract_pieces

SPECIAL = [b"<unk>", b"<s>", b"</s>"]
WHOLES = [
    " o",
    "nc",
    " on",
    "once",
    "ce",
    " once",
    "  ",
    "   ",
    "ab",
    "abc",
    "bc",
    "é",
    "aé",
    " é",
    "abé",
    "漢漢",
    "e\n",
]
CHARACTERS = " abceno.\n\u6f22"
PIECES = [*SPECIAL, *(name.encode() for name in BYTE_PIECES), *(word.encode() for word in (*WHOLES, *CHARACTERS))]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)]

texts = st.one_of(
    st.text(alphabet=" abceno.\n\u00e9\u6f22\u00fc<>0x"), st.text().map(lambda t: t.replace("\u2581", ""))
)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return build_sentencepiece_bpe(PIECES, SCORES, 1)


@given(texts.filter(lambda text: "\0" not in text))
def test_the_ids_are_those_of_run_c(small: Tokenizer, text: str) -> None:
    assert small.encode(text) == encode(PIECES, SCORES, text)


@given(texts)
def test_decoding_gives_the_text_back(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text == decode(PIECES, ids).decode()


def test_stories_have_the_ids_of_run_c_in_the_published_table() -> None:
    pieces, scores = read_table(peer("tok512.bin").read_bytes())
    tokenizer = build_sentencepiece_bpe([piece.strip(b"\n") for piece in pieces], scores, 1)
    for story, _ in zip(iter_stories("sample"), range(4), strict=False):
        ids = tokenizer.encode(story)
        assert ids == encode(pieces, scores, story)
        assert tokenizer.decode(ids) == story


def test_end_and_other_special_tokens_end_a_story(small: Tokenizer) -> None:
    assert small.end_id == 1
    assert [small.is_stop_token(i) for i in (0, 1, 2, 3)] == [True, True, True, False]
    assert small.decode([*small.encode("once"), 1, 2, 0]) == "once"


@given(st.permutations(range(259, len(PIECES))))
@settings(max_examples=20)
def test_pieces_and_scores_survive(order: list[int]) -> None:
    """In any order of the pieces: where the scores fall with the ids the same numbers, else the same order."""
    pieces = [*PIECES[:259], *(PIECES[i] for i in order)]
    tokenizer = build_sentencepiece_bpe(pieces, SCORES, 1)
    again, scores = extract_pieces(tokenizer)
    assert again == [END.encode() if i == 1 else piece for i, piece in enumerate(pieces)]
    assert scores == SCORES
    mixed = [*SCORES[:259], *(SCORES[i] / 3 for i in order)]
    tokenizer = build_sentencepiece_bpe(PIECES, mixed, 1)
    again, scores = extract_pieces(tokenizer)
    assert build_sentencepiece_bpe(PIECES, scores, 1).json_data["model"] == tokenizer.json_data["model"]


def test_byte_level_pieces_are_the_bytes_of_the_tokens() -> None:
    tokenizer = train_bpe(300, iter_stories("sample"))
    pieces, scores = extract_pieces(tokenizer)
    assert pieces[tokenizer.end_id] == b"<unk>"
    assert [p for p in pieces if len(p) == 1] == [p for p in tokenizer.token_bytes if len(p) == 1 and p != b"\0"]
    assert scores[255:258] == [0, 0, -1]
    story = "Once upon a time there was a caf\u00e9."
    assert b"".join(pieces[i] for i in tokenizer.encode(story)) == story.encode()


@pytest.mark.parametrize(
    ("pieces", "scores", "message"),
    [
        ([*SPECIAL, b"a", b"a"], [0.0] * 5, "pieces 3 and 4 are both 'a'"),
        ([*SPECIAL, b" ", b"\xe2\x96\x81"], [0.0] * 5, "pieces 3 and 4 are both"),
        ([*SPECIAL, b""], [0.0] * 4, "piece 3 has 0 characters"),
        ([*SPECIAL, b"a" * 1025], [0.0] * 4, "piece 3 has 1,025 characters"),
        ([*SPECIAL, b"a\xff"], [0.0] * 4, "piece 3 is not UTF-8"),
        ([*SPECIAL, b"a"], [0.0] * 3 + [float("nan")], "score of piece 3"),
        ([*SPECIAL, b"a"], [0.0] * 3, "4 pieces but 3 scores"),
        ([b"<unk>"], [0.0], "id 1, but there are only 1 pieces"),
    ],
)
def test_damaged_tables_are_refused(pieces: list[bytes], scores: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_sentencepiece_bpe(pieces, scores, 1, where="t.bin")


def changed(tokenizer: Tokenizer, **changes: Any) -> str:
    return json.dumps(tokenizer.json_data | changes)


def test_any_special_token_can_become_the_end(small: Tokenizer) -> None:
    text = small.json_text.replace(END, "<s>")
    for end_id in (1, 2):
        tokenizer = set_end_token(text, end_id, "t.json")
        assert tokenizer.end_id == end_id
        assert tokenizer.encode("abc once") == small.encode("abc once")
        assert set_end_token(tokenizer.json_text, 3 - end_id, "t.json").end_id == 3 - end_id, "END moves"


def test_the_end_may_have_another_name() -> None:
    tokenizer = train_bpe(300, iter_stories("sample"))
    last = tokenizer.vocab_size - 1
    assert set_end_token(tokenizer.json_text.replace(END, "<old>"), last, "t.json").special_ids == {last}
    flags = [token | {"special": False} for token in tokenizer.json_data["added_tokens"]]
    assert set_end_token(changed(tokenizer, added_tokens=flags), last, "t.json").special_ids == {last}


def test_the_post_processor_is_dropped(small: Tokenizer) -> None:
    around = {"type": "BertProcessing", "sep": [END, 1], "cls": [END, 1]}
    assert set_end_token(changed(small, post_processor=around), 1, "t.json").json_data["post_processor"] is None


@pytest.mark.parametrize(
    ("text", "end_id", "message"),
    [
        ("{", 1, "t.json is not a Hugging Face tokenizer"),
        ("[]", 1, "t.json is not a Hugging Face tokenizer"),
        ('{"model": {"vocab": 3}, "added_tokens": []}', 1, "t.json is not a Hugging Face tokenizer"),
        ("[" * 100_000, 1, "t.json is not a Hugging Face tokenizer"),
        ("", 5_000, "token 5000"),
        ("", PIECES.index(b"ce"), "cannot end a story"),
    ],
)
def test_tokenizers_without_such_an_end_are_refused(small: Tokenizer, text: str, end_id: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_end_token(text or small.json_text, end_id, "t.json")


def test_other_kinds_have_no_table_of_pieces(small: Tokenizer) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    with pytest.raises(UserError, match="neither byte-level BPE"):
        extract_pieces(Tokenizer(changed(small, model=model, added_tokens=[])))
