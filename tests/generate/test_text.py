from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from tinystories.generate.text import SEPARATOR, TextStream

BYTES = [bytes([b]) for b in range(256)]  # one id for each byte: every character of several bytes comes in parts
FEW = st.text(alphabet="abn\n🐈", max_size=12)
STOPS = st.lists(st.text(alphabet="abn\n🐈", min_size=1, max_size=4), max_size=3)


def feed(data: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """The pieces until a stop string or the end, and the stream."""
    stream = TextStream(BYTES, stop)
    pieces = []
    for token in data:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


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
    stream = TextStream(BYTES, stop)
    for i, char in enumerate(text):
        for b in char.encode():
            stream.push(b)
        if stream.stopped:
            return
        held = text[len(stream.text) : i + 1]
        assert not held or any(s.startswith(held) for s in stop)


def test_separate_stories_are_set_apart_only_where_text_follows() -> None:
    stream = TextStream(BYTES)
    assert stream.separate() == ""
    assert [stream.push(b) for b in b"ab"] == ["a", "b"]
    assert stream.separate() + stream.separate() == ""
    assert [stream.push(b) for b in b"cd"] == [SEPARATOR + "c", "d"]
    assert stream.separate() + stream.finish() == ""
    assert stream.text == f"ab{SEPARATOR}cd"


def test_the_first_story_after_a_prompt_that_ends_at_once_is_set_apart() -> None:
    stream = TextStream(BYTES, begun=True)
    stream.separate()
    assert stream.push(ord("c")) == SEPARATOR + "c"


def test_a_character_cut_by_the_end_of_a_story_does_not_run_into_the_next() -> None:
    stream = TextStream(BYTES)
    stream.push("é".encode()[0])
    assert stream.separate() == "\ufffd"
    assert stream.push("é".encode()[1]) == SEPARATOR + "\ufffd"


def test_a_stop_string_may_be_the_separator() -> None:
    stream = TextStream(BYTES, [SEPARATOR])
    stream.push(ord("a"))
    stream.separate()
    assert stream.push(ord("b")) == ""
    assert stream.stopped
    assert stream.text == "a"
