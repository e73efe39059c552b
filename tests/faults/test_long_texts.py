"""Long stories and long words: memory is a few times the longest story, time is linear, the ids are the same."""

import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, trainers

from tinystories.data import build_tokenizer, encoder
from tinystories.data.build_tokenizer import MAX_WORD_CHARS, new_byte_level_bpe, split_stories, train_bpe
from tinystories.data.encoder import encode_in_pieces, make_bulk_encoder, make_tokenizers_encoder, split_at_words
from tinystories.data.prepare import prepare
from tinystories.data.source import reader
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(400, iter_stories("sample"))


WORDS = st.lists(
    st.sampled_from(["the", "Lily's", "12", "--", "é", "你好", "\U0001f98a", "don't", "'s", "x" * 30])
    | st.sampled_from(
        [" ", "  ", "\n", " \n", "\t", "\r\n", "\u00a0", "\u0085", "\u2003", "\u2028", "\u3000", "\x1c", "\x00"]
    ),
    max_size=40,
).map("".join)


@given(text=WORDS, size=st.integers(1, 50), max_size=st.none() | st.integers(51, 60))
def test_the_pieces_are_the_text(text: str, size: int, max_size: int | None) -> None:
    pieces = list(split_at_words(text.encode(), size, max_size))
    assert "".join(piece.decode() for piece in pieces) == text  # each piece is valid UTF-8
    assert all(len(piece) >= size for piece in pieces[:-1] if max_size is None)
    assert max_size is None or all(len(piece) <= max_size for piece in pieces)


def list_words(text: str) -> list[str]:
    """The words of a text, as the pre-tokenizer cuts it; in GPT-2's characters for bytes."""
    return [word for word, _ in new_byte_level_bpe({}, []).pre_tokenizer.pre_tokenize_str(text)]


@given(text=WORDS, size=st.integers(1, 20))
def test_pieces_have_the_words_of_the_whole_text(text: str, size: int) -> None:
    pieces = split_at_words(text.encode(), size)
    assert [word for piece in pieces for word in list_words(piece.decode())] == list_words(text)


@pytest.mark.parametrize(
    "space", [" ", "\n", "\t", "\r", "\u0085", "\u00a0", "\u1680", "\u2003", "\u2028", "\u205f", "\u3000"]
)
@pytest.mark.parametrize("before", ["x", "é", "你", ".", "\u200a.", ""])
def test_no_piece_ends_inside_white_space(space: str, before: str) -> None:
    text = f"{before}{space}\n y"
    for size in range(1, len(text.encode())):
        pieces = split_at_words(text.encode(), size)
        assert [word for piece in pieces for word in list_words(piece.decode())] == list_words(text)


@given(texts=st.lists(WORDS, max_size=5), size=st.integers(1, 50))
@settings(deadline=None)
def test_pieces_are_encoded_as_the_whole_text(bpe: Tokenizer, texts: list[str], size: int) -> None:
    encode = make_tokenizers_encoder(bpe)
    stories = [text.encode() for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "PIECE_BYTES", size)
        ids, counts = encode_in_pieces(stories, encode, bpe.vocab_size - 1)
    expected_ids, expected_counts = encode(stories)
    assert np.array_equal(ids, expected_ids)
    assert np.array_equal(counts, expected_counts)


@pytest.mark.parametrize(
    "story", ["the cat ran home. " * 9000, "\u3000你好，世界 x" * 9000, "a" * 150_000, "\n" * 150_000], ids=range(4)
)
def test_the_bulk_encoder_gives_long_stories_the_ids_of_the_tokenizer(
    story: str, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "PIECE_BYTES", 1000)
    stories = [b"A short one.", story.encode(), b"Another."]
    ids, counts = make_bulk_encoder(bpe, stories)(stories)
    expected = [bpe.encode(text.decode()) for text in stories]
    assert counts.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [token for row in expected for token in row]


def test_tokenizers_with_other_words_encode_stories_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GPT-2's pre-tokenizer, tokens contain spaces."""
    story = "the cat ran home. " * 20
    backend = new_byte_level_bpe({}, [])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([story], trainer)
    other = Tokenizer(backend.to_str())
    monkeypatch.setattr(encoder, "PIECE_BYTES", 10)
    ids, _ = make_bulk_encoder(other, [story.encode()])([story.encode()])
    assert ids.tolist() == other.encode(story)


def words_of(texts: list[str]) -> Counter[str]:
    """How often each word occurs, as the trainer counts them."""
    return Counter(word for text in texts for word in list_words(text))


@pytest.mark.parametrize(
    "story",
    [
        "the cat ran to a house and saw " * 5_000,  # a book
        "AAECAwQFBgcICQoLDA0ODw" * 2_500,  # base64: no white space, but short words of letters or digits
        "你好，世界。" * 5_000,
        f"{'x' * (MAX_WORD_CHARS - 1)} {'y' * (MAX_WORD_CHARS - 1)} " * 9,
        "short",
    ],
    ids=range(5),
)
def test_the_trainer_counts_the_words_of_the_stories(story: str) -> None:
    pieces = list(split_stories([story], new_byte_level_bpe({}, []).pre_tokenizer))
    assert "".join(pieces) == story
    assert words_of(pieces) == words_of([story])


@pytest.mark.parametrize(
    "run",
    ["a" * 300_000, " " * 5000, "\n" * 200_000, "-" * 5000, "1" * 100_000, "é" * 5000, "你" * 100_000],
    ids=lambda run: f"{ord(run[0])}x{len(run)}",
)
def test_no_word_of_the_trainer_is_long(run: str) -> None:
    """The first is the reported case: training took time quadratic in the length of a run."""
    story = f"A cat. {run} A dog."
    pieces = list(split_stories([story], new_byte_level_bpe({}, []).pre_tokenizer))
    assert "".join(pieces) == story
    longest = max(map(len, words_of(pieces)))  # in bytes: the words are written in GPT-2's characters for bytes
    assert longest <= MAX_WORD_CHARS * len(run[0].encode())


def test_training_says_what_it_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build_tokenizer, "LOG_INTERVAL_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        train_bpe(300, ["a" * 600_000, "b" * 600_000])
    assert "bpe:300: 1 MB of text read (at most 200)" in caplog.text
    assert "training bpe:300 on 1.2 MB of text" in caplog.text


def test_chunks_of_a_long_story_are_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining after every chunk would copy a story as often as it has chunks."""
    monkeypatch.setattr(reader, "BATCH_BYTES", 1000)
    joined = []

    def parse(where: str, chunks: list[bytes], *rest: object) -> object:
        joined.append(len(chunks))
        return original(where, chunks, *rest)  # type: ignore[arg-type]

    original = reader.parse_txt_chunks
    monkeypatch.setattr(reader, "parse_txt_chunks", parse)
    (tmp_path / "a.txt").write_bytes(b"x" * 50_500 + END.encode())
    assert list(iter_stories(tmp_path / "a.txt")) == ["x" * 50_500]
    assert joined == [51]


def test_a_prepared_long_story_is_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PIECE_BYTES", 1000)
    story = "the cat ran to a house and saw " * 3_000
    (tmp_path / "a.txt").write_text(f"{story}{END}One more.{END}", encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer="bpe:300", progress=False)
    tokenizer = Tokenizer.load(tmp_path / "out")
    ids = np.fromfile(tmp_path / "out" / "train.bin", "<u2")
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert tokenizer.decode(ids[ends[0] + 1 : ends[1]].tolist()) == story.strip()


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process")
@pytest.mark.parametrize(
    "story",
    ["'the cat ran to a house and saw ' * 520_000", "'the cat ran ' * 1_000_000 + chr(0x1f98a)", "'a' * 4_000_000"],
)
def test_memory_is_a_few_times_the_story(story: str, tmp_path: Path) -> None:
    """The first is the reported case: 16 MB took 3.2 GB."""
    program = (
        f"open('a.txt', 'w', encoding='utf-8').write({story} + '{END}')\n"
        "from tinystories.data.prepare import prepare\n"
        "prepare('a.txt', 'out', tokenizer='bpe:300', progress=False)\n"
        # Not ru_maxrss: a child begins with its parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 450_000  # kB, of which 130,000 are the libraries
