"""Tokenizers by name: GPT-2's table is tiktoken's, a trained one is reproducible, errors say what to do."""

import base64
import itertools
import socket
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from tinystories.data import build_tokenizer
from tinystories.data.build_tokenizer import build_from_spec, fingerprint_spec, train_bpe
from tinystories.data.encoder import make_bulk_encoder
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError

ODD = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sSdmtlLvereIl0½Ⅷ١é\u0301你😀\u200d\x00.,!?-_<|endoftext|>"


@pytest.fixture(scope="session")
def tiktoken_gpt2(gpt2_tokenizer: Tokenizer) -> tiktoken.Encoding:
    del gpt2_tokenizer  # requested only to make tiktoken find its cached vocabulary
    return tiktoken.get_encoding("gpt2")


@given(text=st.text(st.characters(codec="utf-8")) | st.text(alphabet=ODD) | st.text(alphabet="aehilnorst'  \n"))
@example(text=f"a{END}b {END}")
def test_gpt2_gives_the_ids_of_tiktoken(gpt2_tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, text: str) -> None:
    assert gpt2_tokenizer.encode(text) == tiktoken_gpt2.encode_ordinary(text)


@pytest.mark.slow
def test_gpt2_gives_the_ids_of_tiktoken_on_all_real_stories(
    gpt2_tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding, real_train: Path
) -> None:
    texts = list(iter_stories(real_train))
    assert len(texts) == 14_022
    bulk = make_bulk_encoder(gpt2_tokenizer, [])
    for start in range(0, len(texts), 1000):
        some = texts[start : start + 1000]
        expected = tiktoken_gpt2.encode_ordinary_batch(some, num_threads=2)
        assert gpt2_tokenizer.encode_batch(some) == expected
        assert bulk([text.encode() for text in some])[0].tolist() == list(itertools.chain(*expected))


def test_gpt2_has_the_table_of_tiktoken(gpt2_tokenizer: Tokenizer, tiktoken_gpt2: tiktoken.Encoding) -> None:
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.end_id) == (tiktoken_gpt2.n_vocab, tiktoken_gpt2.eot_token)
    assert gpt2_tokenizer.is_lossless
    assert gpt2_tokenizer.token_bytes[:-1] == [tiktoken_gpt2.decode_single_token_bytes(i) for i in range(50_256)]


def test_training_is_reproducible_and_reads_the_stories() -> None:
    texts = ["the cat sat on the mat"] * 20 + ["a dog ran"] * 5
    first, second = train_bpe(300, texts), train_bpe(300, iter(texts))
    assert first.json_text == second.json_text
    assert first.json_text != train_bpe(300, ["zebras and yaks"] * 9).json_text
    assert len(first.encode(" the cat")) == 2


def test_too_little_text_makes_a_smaller_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_from_spec("bpe:400", lambda: ["ab ab ab"])
    assert 257 < tokenizer.vocab_size < 270
    assert f"only {tokenizer.vocab_size} ids" in caplog.text


def test_training_reads_no_further_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tokenizer, "MAX_TRAINING_BYTES", 1000)
    train_bpe(300, ("a small cat" for _ in iter(int, 1)))  # an endless source


def test_every_byte_has_a_token(bpe: Tokenizer) -> None:
    assert {bytes([b]) for b in range(256)} <= set(bpe.token_bytes)


@pytest.mark.parametrize(
    "spec", ["bpe:256", "bpe:0", "bpe:-5", "bpe:", "bpe:many", "bpe:1e4", "bpe:2000000", "bpe:٣٠٠"]
)
def test_impossible_sizes_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="between 257"):
        fingerprint_spec(spec)


def test_a_path_is_known_by_its_content(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "one.json")
    (tmp_path / "two").mkdir()
    bpe.save(tmp_path / "two")
    assert fingerprint_spec(str(tmp_path / "one.json")) == fingerprint_spec(str(tmp_path / "two"))
    assert build_from_spec(str(tmp_path / "two"), list).json_text == bpe.json_text


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tiktoken cache on a machine without network access."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    go_through(monkeypatch, 9)  # nothing listens there
    return tmp_path


def go_through(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")


@pytest.mark.usefixtures("empty_cache")
def test_without_network_gpt2_says_what_to_do() -> None:
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as caught:
        build_from_spec("gpt2", list)
    assert "bpe:4096" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("empty_cache")
def test_a_network_that_never_answers_does_not_hang_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tokenizer, "FETCH_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        go_through(monkeypatch, silent.getsockname()[1])
        with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
            build_from_spec("gpt2", list)


def test_a_damaged_table_is_not_taken(empty_cache: Path) -> None:
    for name in ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"):
        (empty_cache / name).write_bytes(base64.b64encode(b"not the table"))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        build_from_spec("gpt2", list)
