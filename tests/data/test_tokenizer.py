"""Tokenizer: exact, reversible, and text is never encoded as a special token."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError

TEXTS = st.text(st.characters(codec="utf-8")) | st.text(alphabet=" \t\n\r'abIl0é你\u2028\U0001f600<|endoftx>")


@given(text=TEXTS)
def test_decoding_gives_back_any_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@given(text=TEXTS)
def test_the_table_of_bytes_spells_the_text(bpe: Tokenizer, text: str) -> None:
    assert b"".join(bpe.token_bytes[i] for i in bpe.encode(text)) == text.encode()


@given(left=TEXTS, right=TEXTS)
def test_end_in_text_is_text(bpe: Tokenizer, left: str, right: str) -> None:
    ids = bpe.encode(left + END + right)
    assert bpe.end_id not in ids
    assert bpe.decode(ids) == left + END + right


def test_end_leaves_no_trace_in_text(bpe: Tokenizer) -> None:
    assert bpe.decode([bpe.end_id, *bpe.encode("a cat"), bpe.end_id]) == "a cat"
    assert bpe.token_bytes[bpe.end_id] == b""


def test_broken_characters_become_replacement_characters(bpe: Tokenizer) -> None:
    ids = bpe.encode("é")
    first = next(i for i, data in enumerate(bpe.token_bytes) if data == "é".encode()[:1])
    assert bpe.decode([first]) == "\ufffd"
    assert bpe.decode([first, *ids]) == "\ufffdé"


def test_a_batch_is_its_texts(bpe: Tokenizer) -> None:
    texts = ["a cat", "", f"two {END}", "naïve\n\n"]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


def test_saving_keeps_everything(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    bpe.save(tmp_path / "other.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"):
        again = Tokenizer.load(path)
        assert (again.sha256, again.json_text, again.end_id) == (bpe.sha256, bpe.json_text, bpe.end_id)
        assert again.encode("Once upon a time") == bpe.encode("Once upon a time")


def test_the_hash_sees_meaning_and_not_layout(bpe: Tokenizer) -> None:
    parts = json.loads(bpe.json_text)
    assert Tokenizer(json.dumps(parts, indent=3)).sha256 == bpe.sha256
    parts["model"]["merges"][0], parts["model"]["merges"][1] = parts["model"]["merges"][1], parts["model"]["merges"][0]
    assert Tokenizer(json.dumps(parts)).sha256 != bpe.sha256


def test_vocab_size_is_past_the_largest_id(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 400 == len(bpe.token_bytes)
    assert bpe.end_id == 399


def word_tokenizer(**extra: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "cat": 1, "?": 2, **extra}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def test_end_is_added_where_it_is_missing() -> None:
    tokenizer = Tokenizer(word_tokenizer().to_str())
    assert (tokenizer.end_id, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode(f"a {END} cat") == [0, 2, 1]
    assert not tokenizer.is_lossless


def test_a_model_that_knows_end_as_a_word_is_refused() -> None:
    with pytest.raises(UserError, match="special token"):
        Tokenizer(word_tokenizer(**{END: 3}).to_str(), "words.json")


def test_end_as_an_ordinary_added_token_becomes_special() -> None:
    backend = word_tokenizer()
    backend.add_tokens([END])
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.encode(f"a {END} cat") == [0, 2, 1]
    assert tokenizer.decode([0, tokenizer.end_id]) == "a"


def test_padding_truncation_and_templates_of_a_file_are_not_applied() -> None:
    backend = word_tokenizer(**{"<s>": 3})
    backend.add_special_tokens(["<s>"])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    assert Tokenizer(backend.to_str()).encode("a cat a cat") == [0, 1, 0, 1]


def test_sentencepiece_like_bytes() -> None:
    vocab = {"<unk>": 0, "<0x0A>": 1, "<0xC3>": 2, "▁a": 3, "▁": 4, "a": 5, "b": 6, "▁ab": 7}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁a", "b")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(backend.to_str())
    assert tokenizer.token_bytes[1:8] == [b"\n", b"\xc3", b" a", b" ", b"a", b"b", b" ab"]
    assert tokenizer.encode("ab a\n") == [7, 3, 1]
    assert tokenizer.decode([7, 3, 1]) == "ab a\n"
    assert not tokenizer.is_lossless


def test_wordpiece_bytes() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "cat": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert Tokenizer(backend.to_str()).token_bytes[1:3] == [b" cat", b"s"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "X"}}']
)
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


REPLACE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"}
LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 2000}
NESTED = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 4}] * 4}


@pytest.mark.parametrize("added", [False, True], ids=["a text", "an added token"])
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", LONG),
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 40}),
        ("normalizer", NESTED),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 2000}]}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}] * 40},
        ),
        ("decoder", {"type": "Sequence", "decoders": [REPLACE] * 40}),
    ],
)
def test_texts_that_would_grow_without_end_are_refused_before_one_is_read(
    monkeypatch: pytest.MonkeyPatch, part: str, value: dict[str, Any], added: bool
) -> None:
    parts = json.loads(tokenizers.Tokenizer(models.BPE({"a": 0}, [])).to_str()) | {part: value}
    if added:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
        parts["added_tokens"] = [{"id": 1, "content": "a word", "normalized": True, **flags}]
    monkeypatch.setattr(tokenizers, "Tokenizer", None)
    with pytest.raises(UserError, match=f"its {part} .* 1,000 times longer"):
        Tokenizer(json.dumps(parts))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        normalizers.Sequence(
            [
                normalizers.Replace("``", '"'),
                normalizers.Replace("''", '"'),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            ]
        ),
        normalizers.BertNormalizer(),
        normalizers.ByteLevel(),
    ],
)
def test_normalizers_of_real_tokenizers_are_not_refused(normalizer: Any) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.normalizer = normalizer
    assert Tokenizer(backend.to_str()).encode("a a")


def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a regular file"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


def test_importing_needs_nothing_heavy() -> None:
    code = (
        "import sys, tinystories.data.tokenizer, tinystories.data.dataset, tinystories.data.source.resolve;"
        "print(*{m.partition('.')[0] for m in sys.modules} & {'torch', 'tiktoken', 'datasets', 'tokenizers', 'pyarrow',"
        " 'gigatoken', 'huggingface_hub', 'xxhash'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
