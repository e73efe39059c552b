"""GGUF files hold the model, read back the same, and damage to them is told in one line."""

import contextlib
import json
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as theirs
import numpy as np
import pytest
from format_helpers import GPT2, Build, bundle_of, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.gguf import format as gguf
from tinystories.formats.gguf.mapping import build_tensor_map
from tinystories.formats.imports import import_model
from tinystories.formats.registry import FORMATS
from tinystories.model import GPT

SHAPES: list[dict[str, object]] = [
    {},
    {"tied": False, "n_kv_head": 2, "rope_base": 500.0},
    {"qk_norm": False, "norm_eps": 1e-6},
    {"qk_norm": False, "n_kv_head": 1, "tied": False},
    {"head_size": 8, "n_kv_head": 2},
    GPT2 | {"qkv_bias": True, "tied": True},
    GPT2 | {"qkv_bias": False, "tied": False, "n_embd": 20},
]
SAMPLING = SamplingConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def make(tiny: Callable[..., ModelConfig], awake: Callable[[ModelConfig], GPT], sample_data: Path) -> Build:
    def build(tokenizer: Tokenizer | None = None, **changes: Any) -> ModelBundle:
        tokenizer = tokenizer or Tokenizer.load(sample_data)
        model = awake(tiny(**{"vocab_size": tokenizer.vocab_size, "n_ctx": 64} | changes))
        return bundle_of(model, tokenizer, sampling=SAMPLING)

    return build


def written(model: ModelBundle, folder: Path, precision: str = "f32") -> Path:
    export(model, "gguf", folder / "m.gguf", precision=precision, force=True)
    return folder / "m.gguf"


def require_same_ids(ours: Tokenizer, again: Tokenizer) -> None:
    assert (again.vocab_size, again.end_id, again.special_ids) == (ours.vocab_size, ours.end_id, ours.special_ids)
    texts = [*iter_stories("sample"), f"tell {END} 12 34\n\n don't \u00e9\U0001f600"]
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    assert [again.decode(ids) for ids in again.encode_batch(texts)] == texts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gguf_file_imports_as_the_model_that_was_exported(
    make: Build, tmp_path: Path, shape: dict[str, object]
) -> None:
    model = make(**shape)
    again = import_model(str(written(model, tmp_path)))
    assert again.config == model.config
    assert again.sampling == SAMPLING
    assert again.weights.keys() == model.weights.keys()
    for name, weight in again.weights.items():
        np.testing.assert_array_equal(weight, model.weights[name], err_msg=name)
    require_same_ids(model.tokenizer, again.tokenizer)


def test_the_rows_of_llama_are_pairs(make: Build, tmp_path: Path) -> None:
    model = make(qk_norm=False)
    for tensor in theirs.GGUFReader(written(model, tmp_path)).tensors:
        if tensor.name == "blk.1.attn_k.weight":
            head = model.weights["layers.1.self_attn.k_proj.weight"][6:12]
            np.testing.assert_array_equal(tensor.data[6:12], head[[0, 3, 1, 4, 2, 5]])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_their_reader_finds_what_llama_cpp_wants(make: Build, tmp_path: Path, qk_norm: bool) -> None:
    model = make(qk_norm=qk_norm, n_kv_head=2)
    read = theirs.GGUFReader(written(model, tmp_path))
    kind = "qwen3" if qk_norm else "llama"
    expected = {
        "general.architecture": kind,
        f"{kind}.block_count": 2,
        f"{kind}.attention.head_count_kv": 2,
        f"{kind}.rope.dimension_count": 6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 399,
        "tokenizer.ggml.eos_token_id": 399,
        "tokenizer.ggml.add_bos_token": True,
        "general.sampling.top_k": 40,
    }
    assert {key: read.fields[key].contents() for key in expected} == expected
    assert read.fields["tokenizer.ggml.tokens"].contents()[399] == END
    assert read.fields["tokenizer.ggml.token_type"].contents() == [1] * 399 + [3]
    assert {tensor.tensor_type.name for tensor in read.tensors} == {"F32"}


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_fewer_bits_change_little(make: Build, tmp_path: Path, precision: str, tied: bool) -> None:
    """Each tensor keeps the distance that its type allows; vectors are kept."""
    model = make(n_embd=64, n_ff=80, tied=tied)
    path = tmp_path / "m.gguf"
    gguf.write(model, path, precision)
    again, read = gguf.read(path, None), theirs.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert kinds["token_embd.weight"] == ("Q8_0" if precision == "q4_0" and tied else precision.upper())
    assert kinds.get("output.weight", "Q8_0") == ("Q8_0" if precision != "f16" or tied else "F16")
    assert kinds["blk.0.ffn_down.weight"] == "F16", "rows of 80 are no whole blocks of 32"
    assert kinds["blk.0.attn_q.weight"] == precision.upper()
    steps = {"F32": 0, "F16": 2**-11, "Q8_0": 0.5 / 127, "Q4_0": 1 / 8}
    for their_name, (name,) in build_tensor_map(model.config).items():
        weight, step = model.weights[name], steps[kinds[their_name]]
        assert np.abs(again.weights[name] - weight).max() <= 1.1 * step * np.abs(weight).max(), name
        assert (again.weights[name] != weight).any() == bool(step)


def test_other_types_of_weights_are_read(make: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(gguf, "select_tensor_type", lambda _, __, shape, ___: "BF16" if len(shape) > 1 else "F32")
    gguf.write(model, tmp_path / "m.gguf", "f32")
    again = gguf.read(tmp_path / "m.gguf", None)
    for name, weight in again.weights.items():
        np.testing.assert_allclose(weight, model.weights[name], rtol=2**-8)


def test_ids_that_the_tokenizer_lacks_are_unused(make: Build, tmp_path: Path) -> None:
    model = make(vocab_size=416)
    again = gguf.read(written(model, tmp_path), None)
    assert again.config.vocab_size == 416
    require_same_ids(model.tokenizer, again.tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_goes_there_and_back(make: Build, tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece_tokenizer(add_prefix_space=prefix)
    again = gguf.read(written(make(tokenizer, vocab_size=400), tmp_path), None).tokenizer
    assert again.json_data == tokenizer.json_data
    require_same_ids(tokenizer, again)


def test_the_modelfile_has_template_sampling_and_stop_token(make: Build, tmp_path: Path) -> None:
    written(make(), tmp_path)
    lines = (tmp_path / "m.Modelfile").read_text().splitlines()
    assert lines[:3] == ["# ollama create m -f m.Modelfile", "FROM ./m.gguf", 'TEMPLATE "{{ .Prompt }}"']
    told = dict(line.removeprefix("PARAMETER ").split(" ", 1) for line in lines[3:])
    assert told == {
        "num_ctx": "64",
        "temperature": "0.7",
        "top_k": "40",
        "top_p": "0.9",
        "min_p": "0.1",
        "repeat_penalty": "1.2",
        "repeat_last_n": "-1",
        "stop": f'"{END}"',
    }


def refused(model: ModelBundle, tmp_path: Path, message: str, precision: str = "f32") -> None:
    with pytest.raises(UserError, match=message):
        export(model, "gguf", tmp_path / "no.gguf", precision=precision)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [{"learned_positions": False}, {"activation": "gelu_erf"}, {"scaled_scores": False}, {"window": 8}],
    ids=str,
)
def test_classic_is_refused_unless_it_is_gpt2(make: Build, tmp_path: Path, change: dict[str, object]) -> None:
    refused(make(**GPT2 | change), tmp_path, "llama.cpp cannot run this classic model")


def test_weights_beyond_f16_are_refused(make: Build, tmp_path: Path) -> None:
    model = make()
    model.weights["layers.0.mlp.up_proj.weight"][0, 0] = 70_000  # type: ignore[index]
    refused(model, tmp_path, "blk.0.ffn_up.weight .* f16; use --precision f32", "f16")


def test_other_tokenizers_are_refused(make: Build, tmp_path: Path) -> None:
    ours = make().tokenizer.json_data
    split = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}
    whole = ours["pre_tokenizer"] | {"use_regex": False}
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    for change in ({"pre_tokenizer": split}, {"pre_tokenizer": whole}, {"model": words, "added_tokens": []}):
        refused(make(Tokenizer(json.dumps(ours | change))), tmp_path, "support this model's tokenizer")


def test_the_package_is_named_where_it_is_missing(make: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(make(), tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        gguf.read(path, None)


# Files made by hand. A value is (type, bytes); a tensor (name, shape, kind, offset).


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def texts(*values: bytes | str) -> tuple[int, bytes]:
    return 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def whole(value: int) -> tuple[int, bytes]:
    return 4, struct.pack("<I", value)


def packed(
    values: dict[str, tuple[int, bytes]],
    tensors: list[tuple[str, tuple[int, ...], int, int]] = [],  # noqa: B006
    data: int = 0,
    start: bytes = b"GGUF\3\0\0\0",
) -> bytes:
    parts = [start, struct.pack("<QQ", len(tensors), len(values))]
    parts += [text(key) + struct.pack("<I", kind) + value for key, (kind, value) in values.items()]
    for name, shape, kind, offset in tensors:
        parts.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % 32 + data)


HUGE = 2**63
ONE_KEY = packed({"a": (0, b"\7")})[:38]
DAMAGED = {
    "empty": (b"", "empty"),
    "no GGUF": (b"GGML\3\0\0\0" + bytes(16), "does not start with GGUF"),
    "short": (b"GGUF\3\0\0\0\1", "ends inside its header"),
    "version 1": (packed({}, start=b"GGUF\1\0\0\0"), "version 1 is not 2 or 3"),
    "big-endian": (packed({}, start=b"GGUF\0\0\0\3"), "is not 2 or 3"),
    "many tensors": (b"GGUF\3\0\0\0" + struct.pack("<QQ", HUGE, 0), "9,223,372,036,854,775,808 tensors"),
    "many values": (b"GGUF\3\0\0\0" + struct.pack("<QQ", 0, HUGE), "values"),
    "long key": (b"GGUF\3\0\0\0" + struct.pack("<QQQ", 0, 1, HUGE), "name has 9,223"),
    "long text": (packed({"a": (8, struct.pack("<Q", HUGE))}), "ends inside its header"),
    "many texts": (packed({"a": (9, struct.pack("<IQ", 8, HUGE))}), "list of 9,223,372,036,854,775,808"),
    "many numbers": (packed({"a": (9, struct.pack("<IQ", 4, HUGE))}), "ends inside its header"),
    "nested": (packed({"a": (9, struct.pack("<IQ", 9, 1) * 1000)}), "elements of type 9"),
    "odd type": (packed({"a": (77, b"")}), "type 77"),
    "not UTF-8": (packed({"a": (8, text(b"\xff"))}), "utf-8"),
    "a key twice": (ONE_KEY.replace(b"\1", b"\2", 1) + ONE_KEY[24:], "duplicate key 'a'"),
    "alignment": (packed({"general.alignment": whole(0)}), "general.alignment=0"),
    "no dimensions": (packed({}, [("t", (), 0, 0)]), "0 dimensions"),
    "dimensions": (packed({}, [("t", (1,) * 9, 0, 0)]), "9 dimensions"),
    "nothing": (packed({}, [("t", (4, 0), 0, 0)]), "is empty"),
    "kind": (packed({}, [("t", (4,), 99, 0)]), "99"),
    "half a block": (packed({}, [("t", (33,), 8, 0)], 99), "rows of 33 weights are not whole Q8_0 blocks"),
    "after the end": (packed({}, [("t", (4,), 0, 32)], 32), "extends 16 bytes past the end"),
    "endless": (packed({}, [("t", (HUGE, HUGE), 0, 0)], 32), "past the end of the file"),
    "far away": (packed({}, [("t", (4,), 0, HUGE)], 32), "past the end of the file"),
    "crooked": (packed({}, [("t", (4,), 0, 1)], 64), "not a multiple of 32"),
    "overlap": (packed({}, [("t", (9,), 0, 0), ("u", (9,), 0, 32)], 96), "'u' overlaps 't'"),
    "a tensor twice": (packed({}, [("t", (4,), 0, 0), ("t", (4,), 0, 32)], 64), "duplicate tensor 't'"),
    "other": (packed({"general.architecture": (8, text("mamba"))}), "architecture 'mamba'; only qwen3, llama and gpt2"),
    "no architecture": (packed({}), "general.architecture is missing"),
    "a number": (packed({"general.architecture": whole(1)}), "general.architecture is not a string"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_at_once(tmp_path: Path, name: str) -> None:
    """In one line with the file's name, and without memory for what the file claims."""
    data, message = DAMAGED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as told:
            gguf.read(path, None)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def remade(path: Path, values: dict[str, Any], weights: dict[str, Any]) -> None:
    """The file with other values (None: without) and tensors."""
    read = theirs.GGUFReader(path, "c")
    writer = theirs.GGUFWriter(path.with_suffix(".new"), read.fields["general.architecture"].contents())
    for key, field in read.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = values.pop(key, field.contents())
        if value is not None:
            kind = field.types[0]
            writer.add_key_value(key, value, kind, field.types[-1] if kind is theirs.GGUFValueType.ARRAY else None)
    for key, value in values.items():
        writer.add_key_value(key, value, theirs.GGUFValueType.get_type(value))
    tensors = {tensor.name: tensor.data for tensor in read.tensors} | weights
    for name, data in tensors.items():
        if data is not None:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


NAN = np.full(24, np.nan, np.float32)
TOKENS = [f"t{i}" for i in range(400)]
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "NaN": ({}, {"output_norm.weight": NAN}, "norm.weight .*not finite"),
    "whole numbers": ({}, {"output_norm.weight": np.ones(24, np.int8)}, "is of type I8, which is not supported"),
    "missing": ({}, {"blk.1.ffn_up.weight": None}, "weight 'layers.1.mlp.up_proj.weight' is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "without token_embd.weight"),
    "unknown": ({}, {"rope_freqs.weight": NAN}, "'rope_freqs.weight' is unknown"),
    "shape": ({}, {"blk.0.ffn_up.weight": np.zeros((40, 25), np.float32)}, r"\(40, 25\), expected \(40, 24\)"),
    "a long name": ({"qwen3.\x1b" + "x" * 500: 1}, {}, r"'qwen3.\\x1bx+\.\.\. is set"),
    "setting": ({"qwen3.rope.scaling.type": "yarn"}, {}, "'qwen3.rope.scaling.type' is set"),
    "blocks": ({"qwen3.block_count": 2**32 - 1}, {}, "block_count=4,294,967,295"),
    "context": ({"qwen3.context_length": 2**31}, {}, "context_length=2,147,483,648"),
    "heads": ({"qwen3.attention.head_count": 5}, {}, "n_head=5 must be a multiple"),
    "width of heads": ({"qwen3.attention.key_length": 8}, {}, "value_length=6 must equal the head dimension, 8"),
    "no eps": ({"qwen3.attention.layer_norm_rms_epsilon": None}, {}, "layer_norm_rms_epsilon is missing"),
    "base": ({"qwen3.rope.freq_base": float("inf")}, {}, "rope_base=inf must be finite"),
    "vocabulary": ({"tokenizer.ggml.model": "bert"}, {}, r"\('bert'\) is not supported.*--tokenizer"),
    "split": ({"tokenizer.ggml.pre": "qwen2"}, {}, "'gpt2' with pre-tokenizer 'qwen2'"),
    "tokens": ({"tokenizer.ggml.tokens": TOKENS[:-1]}, {}, "399 tokens but 400 token types"),
    "twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "t7"]}, {}, "tokens 7 and 399 are both 't7'"),
    "not UTF-8": (
        {"tokenizer.ggml.tokens": [b"\xff", *TOKENS[1:]]},
        {},
        "tokenizer.ggml.tokens has a string that is not UTF-8",
    ),
    "end": ({"tokenizer.ggml.bos_token_id": 400}, {}, "token is 400, but there are only 400 tokens"),
    "merge": ({"tokenizer.ggml.merges": ["a b c"]}, {}, "merge does not have two parts"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["zz yy"]}, {}, "not a Hugging Face tokenizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_value_or_tensor_is_named(make: Build, tmp_path: Path, name: str) -> None:
    values, weights, message = WRONG[name]
    path = tmp_path / "m.gguf"
    gguf.write(make(), path, "f32")
    remade(path, dict(values), weights)
    with pytest.raises(UserError, match=message) as told:
        import_model(str(path))
    assert str(path) in str(told.value)


@pytest.mark.parametrize("value", [["a", "b"], [1, 2], 7, "a story"])
def test_a_name_that_is_no_text_is_left_out(make: Build, tmp_path: Path, value: Any) -> None:
    path = written(make(), tmp_path)
    remade(path, {"general.name": None}, {})
    remade(path, {"general.name": value, "general.license": value}, {})
    gguf.read(path, None).write(tmp_path / "model")
    provenance = ModelBundle.read(tmp_path / "model").provenance
    kept = {key: provenance[key] for key in ("name", "license") if key in provenance}
    assert kept == (dict.fromkeys(("name", "license"), value) if isinstance(value, str) else {})


def test_a_tokenizer_can_be_given(make: Build, tmp_path: Path, sample_data: Path) -> None:
    path = written(make(), tmp_path)
    remade(path, {"tokenizer.ggml.pre": "qwen2"}, {})
    require_same_ids(make().tokenizer, gguf.read(path, sample_data / "tokenizer.json").tokenizer)


@pytest.fixture(scope="module")
def sound(make: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    gguf.write(make(n_layer=1), path, "f32")
    return path


@settings(max_examples=150, deadline=None)
@given(at=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_files_are_read_or_refused(sound: Path, at: float, bit: int, cut: bool) -> None:
    """A flipped bit (most often in the header), or a file cut short: never another error than UserError."""
    data = sound.read_bytes()
    place = min(int(at**4 * len(data)), len(data) - 1)
    damaged = bytearray(data)
    damaged[place] ^= 1 << bit
    path = sound.with_suffix(".damaged")
    path.write_bytes(data[:place] if cut else damaged)
    with contextlib.suppress(UserError):
        gguf.read(path, None)


def test_every_precision_is_known() -> None:
    assert FORMATS["gguf"].max_divergence.keys() == gguf.FILE_TYPES.keys()
