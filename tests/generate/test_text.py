from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from tinystories.generate.detokenizer import CONTINUATION_SEPARATOR, StreamingDetokenizer

BYTES = [bytes([b]) for b in range(256)]  # one id for each byte: every character of several bytes comes in parts
FEW = st.text(alphabet="abn\n🐈", max_size=12)
STOPS = st.lists(st.text(alphabet="abn\n🐈", min_size=1, max_size=4), max_size=3)


def feed(data: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], StreamingDetokenizer]:
    """The pieces until a stop string or the end, and the stream."""
    stream = StreamingDetokenizer(BYTES, stop)
    pieces = []
    for token in data:
        pieces.append(stream.add_token(token))
        if stream.stopped:
            break
    return [*pieces, stream.finalize()], stream


@given(st.text())
def test_pieces_are_whole_characters_as_soon_as_they_are_complete(text: str) -> None:
    pieces, stream = feed(text.encode("utf-8", "replace"))
    whole = text.encode("utf-8", "replace").decode()
    assert "".join(pieces) == stream.text == whole
    assert [piece for piece in pieces if piece] == list(whole)


@given(st.binary())
def test_bytes_that_are_no_text_become_replacement_characters(data: bytes) -> None:
    pieces, _ = feed(data)
    assert "".join(pieces) == data.decode("utf-8", "replace")


@given(FEW, STOPS)
@example("ab", ["b", "ab"])
def test_text_ends_before_the_first_stop_string_to_be_complete(text: str, stop: list[str]) -> None:
    ends = [text[:n] for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    expected = min((ends[0][: ends[0].find(s)] for s in stop if s in ends[0]), key=len) if ends else text
    pieces, stream = feed(text.encode(), stop)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(ends)


@given(FEW, STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    stream = StreamingDetokenizer(BYTES, stop)
    for i, char in enumerate(text):
        for b in char.encode():
            stream.add_token(b)
        if stream.stopped:
            return
        held = text[len(stream.text) : i + 1]
        assert not held or any(s.startswith(held) for s in stop)


def test_separate_stories_are_set_apart_only_where_text_follows() -> None:
    stream = StreamingDetokenizer(BYTES)
    assert stream.begin_story() == ""
    assert [stream.add_token(b) for b in b"ab"] == ["a", "b"]
    assert stream.begin_story() + stream.begin_story() == ""
    assert [stream.add_token(b) for b in b"cd"] == [CONTINUATION_SEPARATOR + "c", "d"]
    assert stream.begin_story() + stream.finalize() == ""
    assert stream.text == f"ab{CONTINUATION_SEPARATOR}cd"


def test_the_first_story_after_a_prompt_that_ends_at_once_is_set_apart() -> None:
    stream = StreamingDetokenizer(BYTES, has_prompt=True)
    stream.begin_story()
    assert stream.add_token(ord("c")) == CONTINUATION_SEPARATOR + "c"


def test_a_character_cut_by_the_end_of_a_story_does_not_run_into_the_next() -> None:
    stream = StreamingDetokenizer(BYTES)
    stream.add_token("é".encode()[0])
    assert stream.begin_story() == "\ufffd"
    assert stream.add_token("é".encode()[1]) == CONTINUATION_SEPARATOR + "\ufffd"


def test_a_stop_string_may_be_the_separator() -> None:
    stream = StreamingDetokenizer(BYTES, [CONTINUATION_SEPARATOR])
    stream.add_token(ord("a"))
    stream.begin_story()
    assert stream.add_token(ord("b")) == ""
    assert stream.stopped
    assert stream.text == "a"
