"""Folders that transformers' own programs use, and folders of theirs, whole, in parts and damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from format_helpers import Build
from safetensors.numpy import load_file, save_file

from tinystories.data.source.resolve import iter_stories
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.hf.format import read
from tinystories.formats.imports import import_model


@pytest.fixture
def model(portable: Build) -> ModelBundle:
    return portable("qwen3")


@pytest.fixture
def folder(model: ModelBundle, tmp_path: Path) -> Path:
    export(model, "hf", tmp_path / "hf")
    return tmp_path / "hf"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_transformers_reads_texts_and_writes_stories(model: ModelBundle, folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for story in list(iter_stories("sample"))[:40]:
        assert tokenizer(story).input_ids == [model.tokenizer.end_id, *model.tokenizer.encode(story)]
        assert tokenizer(story, add_special_tokens=False).input_ids == model.tokenizer.encode(story)
        assert tokenizer.decode(tokenizer(story).input_ids, skip_special_tokens=True) == story
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = theirs.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.eos_token_id) == (True, 0.7, 9, 399)
    write = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    (told,) = write("Once upon a time", max_length=None, max_new_tokens=6)
    assert told["generated_text"].startswith("Once upon a time")


def test_ctranslate2_writes_the_same_ids(model: ModelBundle, folder: Path, tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The cat").input_ids
    (told,) = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)],
        max_length=10,
        min_length=10,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=[],
        static_prompt=None,
    )
    expected = list(ids)
    for _ in range(10):
        expected.append(int(model.logits(expected)[-1].argmax()))
    assert told.sequences_ids[0][:10] == expected[len(ids) :]


def test_parts_and_pickled_weights_are_the_same_model(model: ModelBundle, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    names = list(weights)
    places = {}
    for i, part in enumerate((names[:half], names[half:]), 1):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
        places |= dict.fromkeys(part, f"model-0000{i}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    require_same(read(folder, None), model)
    (folder / "model.safetensors.index.json").unlink()
    tensors = {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(tensors, folder / "pytorch_model.bin")
    require_same(read(folder, None), model)


def require_same(found: ModelBundle, model: ModelBundle) -> None:
    assert found.config == model.config
    assert all((found.weights[name] == weight).all() for name, weight in model.weights.items())


def test_bf16_weights_are_widened(model: ModelBundle, folder: Path) -> None:
    from safetensors.torch import save_file as save_torch

    weights = load_file(folder / "model.safetensors")
    save_torch(
        {name: torch.tensor(weight).bfloat16() for name, weight in weights.items()}, folder / "model.safetensors"
    )
    found = read(folder, None)
    for name, weight in model.weights.items():
        assert (found.weights[name] == torch.tensor(weight).bfloat16().float().numpy()).all()


def test_older_tokenizer_files_and_other_names_of_the_end(model: ModelBundle, folder: Path) -> None:
    parts = json.loads((folder / "tokenizer.json").read_text())
    vocab = {token: i for token, i in parts["model"]["vocab"].items() if i != model.tokenizer.end_id}
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab | {"</s>": model.tokenizer.end_id}))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]), encoding="utf-8")
    found = read(folder, None).tokenizer
    text = "The “cats” sat\n\nby 12 seas."
    assert found.end_id == model.tokenizer.end_id
    assert found.encode(text) == model.tokenizer.encode(text)


def test_a_folder_of_ours_is_read_as_such(model: ModelBundle, tmp_path: Path) -> None:
    model.write(tmp_path / "ours")
    assert import_model(str(tmp_path / "ours")).provenance == {"tokens_seen": 5}


def device(path: Path) -> None:
    """A link to what has no end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def sharded(folder: Path, file: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "shard.safetensors").symlink_to("/dev/zero")
    index = {"weight_map": {"model.norm.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def older_tokenizer(folder: Path, merges: bytes) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_bytes(merges)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda folder: edit(folder / "config.json", model_type="mamba"), "model_type='mamba' is not one of"),
        (lambda folder: edit(folder / "config.json", model_type=[]), r"model_type=\[\] is not one of"),
        (lambda folder: edit(folder / "config.json", model_type={}), r"model_type=\{\} is not one of"),
        (lambda folder: edit(folder / "config.json", model_type="\x1b" * 99), r"'(\\x1b)+\.\.\. is not one of"),
        (lambda folder: edit(folder / "config.json", hidden_size=64), "weight .* has shape .*, expected"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=2**31), "n_layer=2,147,483,648"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "weight .* is missing"),
        (lambda folder: edit(folder / "config.json", max_position_embeddings=2**40), "n_ctx=1,099,511,627,776"),
        (lambda folder: device(folder / "config.json"), "config.json is not a regular file"),
        (lambda folder: device(folder / "tokenizer.json"), "(has no tokenizer|is not a regular file)"),
        (lambda folder: device(folder / "model.safetensors"), "contains no weights"),
        (lambda folder: sharded(folder, "/dev/zero"), "names files outside its folder"),
        (lambda folder: sharded(folder, "shard.safetensors"), "shard.safetensors is missing"),
        (lambda folder: sharded(folder, "\0"), "names files outside its folder"),
        (lambda folder: sharded(folder, ".."), "names files outside its folder"),
        (lambda folder: sharded(folder, ""), "names files outside its folder"),
        (lambda folder: sharded(folder, "x" * 300), "names files outside its folder"),
        (lambda folder: sharded(folder, ["a"]), "names files outside its folder"),
        (lambda folder: (folder / "config.json").write_text(" " * 64_000_001), "larger than 64 MB"),
        (lambda folder: older_tokenizer(folder, b"\xff\xfe a"), "merges.txt is not UTF-8"),
        (lambda folder: edit(folder / "config.json", rope_scaling={"rope_type": "yarn"}), "only rope_theta"),
        (lambda folder: (folder / "model.safetensors").unlink(), "contains no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer; .* --tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a Hugging Face tokenizer"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        read(folder, None)
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_numbers_too_large_for_fp32_are_refused_without_a_warning(folder: Path) -> None:
    weights = {name: weight.astype(np.float64) for name, weight in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][0] = 1e300
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        read(folder, None).check()


def test_a_truncated_file_and_a_way_out_of_the_folder_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            read(folder, None)
    weights.unlink()
    (folder.parent / "secret.safetensors").write_bytes(data)
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names files outside its folder"):
        read(folder, None)
