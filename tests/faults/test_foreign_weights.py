"""Weights, sampling settings and files of other programs: what is not read is named, and parts are put together."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from foreign_models import GPT2, LLAMA, SIZES, Awake, bundle_weights, byte_level, write_folder
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.prepare import prepare
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.gguf.format import read_sampling
from tinystories.formats.imports import import_model

# Weights of types that are not read.


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_types_that_are_not_read_are_named(awake: Awake, tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    backend = byte_level("<s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model)
    tensors = {name: torch.tensor(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"weight 'model\.layers\.0\.mlp\.up_proj\.weight' is of type \S+,"):
        import_model(str(folder))


def test_masks_are_of_any_type(awake: Awake, tmp_path: Path) -> None:
    backend = byte_level("<s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), qkv_bias=True, **GPT2, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model)
    tensors = {name: torch.tensor(weight) for name, weight in load_file(folder / "model.safetensors").items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors")
    assert import_model(str(folder)).config.n_layer == 1


def test_a_state_dict_of_another_type_is_named(awake: Awake, tmp_path: Path) -> None:
    model = awake(ModelConfig(vocab_size=300, **GPT2, **SIZES)).to(torch.float8_e4m3fn)
    torch.save(model.state_dict(), tmp_path / "gpt.pt")
    with pytest.raises(UserError, match=r"is torch\.float8_e4m3fn of shape"):
        import_model(str(tmp_path / "gpt.pt"))


# SentencePiece's own files.

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"


@pytest.mark.parametrize("name", ["tokenizer.model", "spm.bin"], ids=["by its name", "by its contents"])
def test_sentencepiece_files_are_named(awake: Awake, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SENTENCEPIECE)
    model = awake(ModelConfig(vocab_size=300, **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", byte_level("<s>"), model)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE)
    export(
        ModelBundle(config=model.config, weights=bundle_weights(model), tokenizer=Tokenizer(byte_level(END).to_str())),
        "llama2c",
        tmp_path / "m.bin",
    )
    refused: list[Callable[[], object]] = [
        lambda: Tokenizer.load(tmp_path / name),
        lambda: import_model(str(folder), tmp_path / name),
        lambda: import_model(str(folder)),
        lambda: Tokenizer.load(folder),
        lambda: import_model(str(tmp_path / "m.bin"), tmp_path / name),
        lambda: prepare("sample", tmp_path / "data", tokenizer=str(tmp_path / name), progress=False),
    ]
    for attempt in refused:
        with pytest.raises(UserError, match=r"SentencePiece's own format, .*AutoTokenizer\.from_pretrained"):
            attempt()


# Sampling settings of other programs.

DEFAULTS = SamplingConfig()


@pytest.mark.parametrize(
    ("settings", "expected", "named"),
    [
        ({"temperature": 0}, SamplingConfig(temperature=0.0), []),
        ({"temperature": -1, "top_p": 0.5}, SamplingConfig(top_p=0.5), ["temperature=-1"]),
        ({"top_k": None, "top_p": 1.5}, DEFAULTS, ["top_p=1.5"]),
        (
            {"repetition_penalty": "1.2", "no_repeat_ngram_size": 3, "typical_p": 2},
            DEFAULTS,
            ["repetition_penalty='1.2'"],
        ),
        ({"top_k": 2**70, "temperature": float("nan"), "min_p": [1]}, DEFAULTS, ["top_k", "temperature", "min_p"]),
        ({"top_k": True}, DEFAULTS, ["top_k=True"]),
    ],
)
def test_odd_sampling_settings_refuse_nothing(
    awake: Awake,
    tmp_path: Path,
    settings: dict[str, Any],
    expected: SamplingConfig,
    named: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = byte_level("<s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model, {"generation_config.json": settings})
    assert import_model(str(folder)).sampling == expected
    assert len(caplog.records) == len(named)
    for words in named:
        assert words in caplog.text


def test_odd_sampling_settings_of_a_gguf_file(caplog: pytest.LogCaptureFixture) -> None:
    file = SimpleNamespace(
        path="m.gguf",
        metadata={"general.sampling.temp": -1.0, "general.sampling.top_k": 7, "general.sampling.top_p": "x"},
    )
    assert read_sampling(file) == SamplingConfig(top_k=7)  # type: ignore[arg-type]
    assert "m.gguf: temperature=-1.0" in caplog.text
    assert "m.gguf: top_p='x'" in caplog.text


# Parts of split models.


def split_safetensors(folder: Path) -> list[Path]:
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    parts = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path, part in zip(parts, (tensors[::2], tensors[1::2]), strict=True):
        checkpoint.save_weights(path, dict(part))
    return parts


def test_parts_of_a_folder_are_read_without_an_index(awake: Awake, tmp_path: Path) -> None:
    backend = byte_level("<s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model)
    whole = import_model(str(folder))
    parts = split_safetensors(folder)
    for name, weight in import_model(str(folder)).weights.items():
        np.testing.assert_array_equal(weight, whole.weights[name])
    with pytest.raises(
        UserError, match=r"one part of the weights of a Hugging Face model; .*tinystories import \S+/m "
    ):
        import_model(str(parts[1]))
    parts[1].unlink()
    with pytest.raises(UserError, match=r"one of the 2 files .*model-00002-of-00002\.safetensors"):
        import_model(str(folder))


def write_gguf_part(path: Path, whole: gguf.GGUFReader, names: list[str], is_first: bool) -> None:
    writer = gguf.GGUFWriter(path, "llama" if is_first else "")
    for key, field in whole.fields.items():
        if is_first and not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    writer.add_uint16("split.count", 2)
    for tensor in whole.tensors:
        if tensor.name in names:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_parts_of_a_gguf_file_are_read(awake: Awake, tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_level(END).to_str())
    model = awake(ModelConfig(vocab_size=tokenizer.vocab_size, **LLAMA, **SIZES))
    bundle = ModelBundle(config=model.config, weights=bundle_weights(model), tokenizer=tokenizer)
    export(bundle, "gguf", tmp_path / "whole.gguf")
    whole = gguf.GGUFReader(tmp_path / "whole.gguf")
    names = [tensor.name for tensor in whole.tensors]
    (tmp_path / "parts").mkdir()
    parts = [tmp_path / "parts" / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    write_gguf_part(parts[0], whole, names[::2], is_first=True)
    write_gguf_part(parts[1], whole, names[1::2], is_first=False)
    for source in (*parts, tmp_path / "parts"):
        again = import_model(str(source))
        for name, weight in bundle.weights.items():
            np.testing.assert_array_equal(again.weights[name], weight)
    renamed = parts[0].rename(tmp_path / "parts" / "renamed.gguf")
    with pytest.raises(UserError, match="one part of a split model, but not named like one"):
        import_model(str(renamed))
    with pytest.raises(UserError, match=r"one of the 2 files .*m-00001-of-00002\.gguf"):
        import_model(str(parts[1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.00.pth", "original layout of Llama"),
        ("consolidated.safetensors", "original layout of Llama"),
        ("pytorch_model-00001-of-00002.bin", "one part of the weights of a Hugging Face model"),
        ("model.safetensors", "the weights of a Hugging Face model; import its folder"),
        ("m-00001-of-00000.gguf", "claims to be part of a model of 0 files"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"PK")
    with pytest.raises(UserError, match=message):
        import_model(str(tmp_path / name))
    if name.startswith("consolidated"):
        with pytest.raises(UserError, match=message):
            import_model(str(tmp_path))


def test_the_weights_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"import its folder, .*: tinystories import {tmp_path} --out DIR"):
        import_model(str(tmp_path / "pytorch_model.bin"))
