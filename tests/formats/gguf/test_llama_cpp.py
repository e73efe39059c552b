"""llama.cpp with our files: the same words, the same stories, the same bits."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as theirs
import numpy as np
import pytest
from format_helpers import GPT2, Build, bundle_of, sentencepiece_tokenizer
from run_llama import ask, quantize

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.gguf import format as gguf
from tinystories.generate.batching import Request, generate_all
from tinystories.model import GPT

# Not imported here: it leaves a file open when the process ends, which a warning would tell.
missing = importlib.util.find_spec("llama_cpp") is None
pytestmark = [pytest.mark.interop, pytest.mark.skipif(missing, reason="needs llama-cpp-python")]

Train = Callable[[ModelConfig], tuple[GPT, np.ndarray]]
KINDS: dict[str, dict[str, object]] = {
    "qwen3": {},
    "llama": {"qk_norm": False},
    "gpt2": GPT2 | {"qkv_bias": True},
}
VARIATIONS = [
    "don't we'll they've I'm you're he'd it's DON'T WE'LL",
    "1 22 333 4444 1,234.56 -7 3rd \u00bd \u0663\u0664",
    "one\ntwo\n\nthree\n\n\n four \n five\r\nsix\t\tseven",
    " leading and trailing   spaces  ",
    "   ",
    "\n",
    "caf\u00e9 na\u00efve \u00fcber \u4f60\u597d \u0645\u0631\u062d\u0628\u0627 e\u0301",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f",
    "\u00a0\u2003\u3000wide spaces\u00a0",
    f"the text {END} is not the end",
    "\u201cQuotes,\u201d she said\u2014\u2018yes\u2019\u2026 (really?) [no] {x} <y> #1 @2 $3 100%",
    "\x00\x01\x7f\ufeff",
    "CamelCase snake_case UPPER x1y2z3 a.b.c!!??...",
]


@pytest.fixture(scope="module")
def make(trained: Train, sample_data: Path) -> Build:
    def build(**shape: Any) -> ModelBundle:
        config = ModelConfig(
            **{"vocab_size": 400, "n_ctx": 256, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_ff": 96} | shape
        )
        return bundle_of(trained(config)[0], Tokenizer.load(sample_data))

    return build


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *itertools.product(KINDS, ({}, {"tied": False})),
        *itertools.product(("qwen3", "llama"), ({"n_kv_head": 2}, {"head_size": 24, "tied": False})),
    ],
    ids=str,
)
def test_llama_cpp_generates_the_same_ids(make: Build, tmp_path: Path, kind: str, shape: dict[str, object]) -> None:
    require_same_story(make(**KINDS[kind] | shape), tmp_path)


def test_llama_cpp_generates_the_bundled_storytellers_ids(tmp_path: Path) -> None:
    require_same_story(ModelBundle.read(BUNDLED_MODEL), tmp_path)


def require_same_story(model: ModelBundle, tmp_path: Path) -> None:
    """100 ids, the likeliest each time, after a prompt of text."""
    export(model, "gguf", tmp_path / "m.gguf")
    request = Request(
        prompt="Once upon a time", settings=SamplingConfig(temperature=0), max_tokens=100, ignore_end=True
    )
    ours = generate_all(CpuEngine(model.config, model.weights), model.tokenizer, [request])[0].ids
    prompt = [model.tokenizer.end_id, *model.tokenizer.encode(request.prompt)]
    told = ask(tmp_path / "m.gguf", prompt=prompt, tokens=100, texts=[request.prompt])
    assert told["ids"] == [prompt]
    assert len(ours) == 100
    assert tuple(told["told"]) == ours


def require_same_words(tokenizer: Tokenizer, told: dict[str, Any], texts: list[str], lead: str = "") -> None:
    assert len(texts) > 180
    assert told["end"] == [tokenizer.end_id, tokenizer.end_id]
    for text, ids, back in zip(texts, told["ids"], told["texts"], strict=True):
        assert ids == [tokenizer.end_id, *tokenizer.encode(text)], text
        assert back == lead + text


def test_llama_cpp_tokenizes_byte_level_bpe_as_we_do(make: Build, tmp_path: Path) -> None:
    model = make()
    export(model, "gguf", tmp_path / "m.gguf")
    texts = [*iter_stories("sample"), *VARIATIONS, *(f"{text} {text}" for text in VARIATIONS)]
    told = ask(tmp_path / "m.gguf", prompt=[399], tokens=1, texts=texts)
    require_same_words(model.tokenizer, told, texts)


def test_llama_cpp_tokenizes_sentencepiece_as_we_do(make: Build, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    model = make()
    model = ModelBundle(config=model.config, weights=model.weights, tokenizer=tokenizer)
    export(model, "gguf", tmp_path / "m.gguf")
    texts = [*iter_stories("sample"), *VARIATIONS]
    told = ask(tmp_path / "m.gguf", prompt=[1], tokens=1, texts=texts)
    require_same_words(tokenizer, told, texts, lead=" ")


@pytest.mark.parametrize("shape", [{}, {"tied": False}, KINDS["gpt2"]], ids=["tied", "untied", "gpt2"])
@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_quantizes_to_the_same_file(
    make: Build, tmp_path: Path, precision: str, shape: dict[str, object]
) -> None:
    """Types and bits of each tensor, rows of 80 among them."""
    model = make(n_ff=80, **shape)
    ours, whole, made = (tmp_path / name for name in ("ours.gguf", "whole.gguf", "made.gguf"))
    gguf.write(model, ours, precision)
    gguf.write(model, whole, "f32")
    quantize(whole, made, {"f16": 1, "q4_0": 2, "q8_0": 7}[precision])
    expected = {tensor.name: tensor for tensor in theirs.GGUFReader(made).tensors}
    for tensor in theirs.GGUFReader(ours).tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type, tensor.name
        np.testing.assert_array_equal(tensor.data, expected[tensor.name].data, err_msg=tensor.name)


def test_a_file_quantized_by_llama_cpp_is_read(make: Build, tmp_path: Path) -> None:
    """A head in 6 bits, as llama.cpp likes it where rows are blocks of 256."""
    model = make(n_embd=256, n_layer=1)
    gguf.write(model, tmp_path / "whole.gguf", "f32")
    quantize(tmp_path / "whole.gguf", tmp_path / "made.gguf", 2)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in theirs.GGUFReader(tmp_path / "made.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    again = gguf.read(tmp_path / "made.gguf", None)
    assert again.config == model.config
    ours = model.weights["embed_tokens.weight"]
    assert np.abs(again.weights["embed_tokens.weight"] - ours).max() < np.abs(ours).max() / 32
