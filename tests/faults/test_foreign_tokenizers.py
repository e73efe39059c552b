"""Loading another program's model does not change its vocabulary: one of its own tokens ends stories.

Reported: a Llama folder with <s> and </s> was refused, and a model with a padded vocabulary could not be trained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from foreign_models import GPT2, LLAMA, SIZES, STORY, Awake, byte_level, write_folder

from tinystories import checkpoint
from tinystories.config import Config, DataConfig, ModelConfig, TrainConfig
from tinystories.data.prepare import prepare
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.evaluate.report import evaluate_model
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.imports import import_model
from tinystories.generate.storyteller import Storyteller
from tinystories.train.run import train


def require_same_vocabulary(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, end: str) -> None:
    """The tokenizer has the ids of `backend`, in texts and in number, and its token `end` is END."""
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.end_id == backend.token_to_id(end)
    assert tokenizer.encode(STORY) == backend.encode(STORY, add_special_tokens=False).ids
    names = {i: name for name, i in backend.get_vocab().items()}
    ours = {i: name for name, i in tokenizer._backend.get_vocab().items()}
    assert {i for i in names if names[i] != ours[i]} <= {tokenizer.end_id, backend.token_to_id(END)}


# For each folder: the special tokens, JSON files by the ids of tokens, and the token that becomes END.
Files = Callable[[Callable[[str], int | None]], dict[str, dict[str, Any]]]
FOLDERS: dict[str, tuple[list[str], Files, str]] = {
    "reported: a Llama with <s> and </s>": (
        ["<s>", "</s>"],
        lambda id_of: {"config.json": {"bos_token_id": id_of("<s>"), "eos_token_id": id_of("</s>")}},
        "<s>",
    ),
    "no BOS and several EOS, as in Qwen": (
        ["<|im_start|>", "<|im_end|>", "<|eot|>"],
        lambda id_of: {"config.json": {"bos_token_id": None, "eos_token_id": [id_of("<|eot|>"), id_of("<|im_end|>")]}},
        "<|eot|>",
    ),
    "ids in generation_config.json": (
        ["<pad>", "<x>"],
        lambda id_of: {"generation_config.json": {"bos_token_id": id_of("<x>")}},
        "<x>",
    ),
    "names in tokenizer_config.json": (
        ["<pad>", "<x>"],
        lambda _: {"tokenizer_config.json": {"eos_token": "<x>"}},
        "<x>",
    ),
    "names as objects": (
        ["<pad>", "<x>"],
        lambda _: {"special_tokens_map.json": {"bos_token": {"content": "<x>"}}},
        "<x>",
    ),
    "nothing is said, but a name is common": (["<pad>", "</s>"], lambda _: {}, "</s>"),
    "an id that does not exist, GPT2Config's default": (
        [END],
        lambda _: {"config.json": {"bos_token_id": 50256, "eos_token_id": 50256}},
        END,
    ),
    "an id of ordinary text, as LlamaConfig's default may be": (
        ["</s>"],
        lambda id_of: {"config.json": {"bos_token_id": id_of("!"), "eos_token_id": id_of("the")}},
        "</s>",
    ),
    "not an id": (["<s>"], lambda _: {"config.json": {"bos_token_id": "x", "eos_token_id": [[]]}}, "<s>"),
    "END exists, but another token begins a text": (
        ["<s>", END],
        lambda id_of: {"config.json": {"bos_token_id": id_of("<s>")}},
        "<s>",
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_keep_their_vocabulary(awake: Awake, tmp_path: Path, kind: str, first: bool) -> None:
    names, files, end = FOLDERS[kind]
    backend = byte_level(*names, first=first)
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model, files(backend.token_to_id))
    import_model(str(folder)).write(tmp_path / "out")
    assert checkpoint.read_model(tmp_path / "out").config.vocab_size == backend.get_vocab_size()
    require_same_vocabulary(checkpoint.read_model(tmp_path / "out").tokenizer(), backend, end)


def test_a_token_that_is_passed_over_is_named(awake: Awake, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = byte_level("</s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    import_model(str(write_folder(tmp_path / "m", backend, model, {"config.json": {"bos_token_id": 4000}})))
    assert "bos_token_id of config.json is 4000, which is not a special token" in caplog.text


def test_no_special_token_at_all(awake: Awake, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = byte_level()
    V = backend.get_vocab_size()
    exact = write_folder(tmp_path / "exact", backend, awake(ModelConfig(vocab_size=V, **LLAMA, **SIZES)))
    with pytest.raises(UserError, match="no special token can end stories; set bos_token_id"):
        import_model(str(exact))
    padded = write_folder(tmp_path / "padded", backend, awake(ModelConfig(vocab_size=V + 4, **LLAMA, **SIZES)))
    assert import_model(str(padded)).tokenizer.end_id == V
    assert "has not learned" in caplog.text


def test_special_tokens_without_an_embedding_are_dropped(
    awake: Awake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = byte_level("<s>")
    V = backend.get_vocab_size()
    plain = byte_level("<s>")
    backend.add_special_tokens(["[PAD]"])
    folder = write_folder(tmp_path / "m", backend, awake(ModelConfig(vocab_size=V, **LLAMA, **SIZES)))
    require_same_vocabulary(import_model(str(folder)).tokenizer, plain, "<s>")
    assert "no embedding of '[PAD]'" in caplog.text


def test_parts_of_a_tokenizer_may_be_absent() -> None:
    parts = json.loads(byte_level(END).to_str())
    parts = {name: value for name, value in parts.items() if value is not None}
    for absent in ((), ("added_tokens",)):
        tokenizer = Tokenizer(json.dumps({name: value for name, value in parts.items() if name not in absent}))
        assert tokenizer.decode(tokenizer.encode(STORY)) == STORY


def test_a_gguf_file_with_its_tokenizer_json(awake: Awake, tmp_path: Path) -> None:
    backend = byte_level("<s>", "</s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **LLAMA, **SIZES))
    folder = write_folder(tmp_path / "m", backend, model, {"config.json": {"bos_token_id": 1}})
    export(import_model(str(folder)), "gguf", tmp_path / "m.gguf")
    tokenizer = import_model(str(tmp_path / "m.gguf"), folder).tokenizer
    require_same_vocabulary(tokenizer, backend, "</s>")


@pytest.mark.parametrize("names", [["<s>"], ["<pad>", "<x>"]])
def test_a_state_dict_with_a_tokenizer_json(awake: Awake, tmp_path: Path, names: list[str]) -> None:
    backend = byte_level(*names)
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size(), **GPT2, **SIZES))
    torch.save({"model": model.state_dict(), "config": {"n_head": 2}}, tmp_path / "gpt.pt")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": names[-1]}))
    tokenizer = import_model(str(tmp_path / "gpt.pt"), tmp_path / "tokenizer.json").tokenizer
    require_same_vocabulary(tokenizer, backend, names[-1])


def test_gpt2_names_a_tokenizer_for_every_format(awake: Awake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = byte_level(END, first=False)
    gpt2 = Tokenizer(backend.to_str())
    monkeypatch.setattr("tinystories.formats.end_token.load_gpt2", lambda: gpt2)
    model = awake(ModelConfig(vocab_size=gpt2.vocab_size + 7, **GPT2, **SIZES))
    torch.save({"model": model.state_dict(), "config": {"n_head": 2}}, tmp_path / "gpt.pt")
    folder = write_folder(tmp_path / "m", byte_level("<s>"), model)
    for source in (tmp_path / "gpt.pt", folder):
        assert import_model(str(source), Path("gpt2")).tokenizer.sha256 == gpt2.sha256


# Padded vocabularies.


@pytest.fixture
def padded(awake: Awake, tmp_path: Path) -> Path:
    """A model directory with 20 ids more than its tokenizer has, imported from a folder of GPT-2."""
    backend = byte_level("<s>")
    model = awake(ModelConfig(vocab_size=backend.get_vocab_size() + 20, **GPT2, **SIZES))
    import_model(str(write_folder(tmp_path / "hf", backend, model))).write(tmp_path / "model")
    return tmp_path / "model"


def init_config(model: Path, data: Path, **changes: Any) -> Config:
    settings = SIZES | GPT2 | changes
    steps = TrainConfig(
        init=str(model), steps=2, batch_size=2, micro_batch=2, sample_tokens=3, device="cpu", sample_prompts=("the",)
    )
    return Config(model=ModelConfig(**settings), data=DataConfig(dir=str(data)), train=steps)


@pytest.fixture
def data(padded: Path, tmp_path: Path) -> Path:
    (tmp_path / "stories.txt").write_text(f"\n{END}\n".join(f"{STORY} {i}" for i in range(40)))
    prepare(tmp_path / "stories.txt", tmp_path / "data", tokenizer=str(padded), val_fraction=0.2, progress=False)
    return tmp_path / "data"


@pytest.mark.parametrize("asked", [0, 20], ids=["reported: left to the model", "reported: set to the model's"])
def test_a_padded_model_is_trained_further(padded: Path, data: Path, tmp_path: Path, asked: int) -> None:
    V = checkpoint.read_model(padded).config.vocab_size
    report = train(init_config(padded, data, vocab_size=V if asked else 0), tmp_path / "run")
    assert report is not None
    assert checkpoint.read_model(tmp_path / "run").config.vocab_size == V
    assert train(init_config(padded, data), tmp_path / "run", resume=True) is None, "the flags may leave it to the run"
    export(ModelBundle.read(tmp_path / "run"), "gguf", tmp_path / "run.gguf")


def test_another_padding_than_the_models_is_refused(padded: Path, data: Path, tmp_path: Path) -> None:
    config = init_config(padded, data, vocab_size=400)
    with pytest.raises(UserError, match=r"vocab_size=400\): use --model\.vocab_size \d+$"):
        train(config, tmp_path / "run")


def test_all_differences_are_told_at_once(padded: Path, tmp_path: Path, sample_data: Path) -> None:
    config = init_config(padded, sample_data, n_layer=3, activation="relu", learned_positions=False)
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        f"another tokenizer than the data, which must be prepared with: tinystories prepare ... --tokenizer {padded}",
        "n_layer=3",
        "--model.n_layer 1",
        "--model.activation gelu_tanh",
        "--model.learned_positions true",
    ):
        assert words in message
    assert "vocab_size" not in message


@pytest.mark.parametrize("n_ctx", [16, 64, 80])
def test_learned_positions_may_be_more_or_fewer(
    padded: Path, data: Path, tmp_path: Path, n_ctx: int, caplog: pytest.LogCaptureFixture
) -> None:
    train(init_config(padded, data, n_ctx=n_ctx), tmp_path / "run")
    table = ModelBundle.read(tmp_path / "run").weights["embed_positions.weight"]
    learned = ModelBundle.read(padded).weights["embed_positions.weight"]
    n = min(n_ctx, 64)
    np.testing.assert_allclose(table[:n], learned[:n], atol=0.05)
    assert table.shape == (n_ctx, 32)
    assert ("initialized at random" in caplog.text) == (n_ctx > 64)


@pytest.mark.parametrize("name", ["hf", "gguf", "llama2c", "onnx"])
def test_a_padded_model_is_exported(awake: Awake, tmp_path: Path, name: str) -> None:
    backend = byte_level("<s>", "</s>")
    V = backend.get_vocab_size() + 11
    folder = write_folder(tmp_path / "m", backend, awake(ModelConfig(vocab_size=V, **LLAMA, **SIZES)))
    model = import_model(str(folder))
    out = tmp_path / "m.bin" if name == "llama2c" else tmp_path / f"out.{name}"
    export(model, name, out)
    if name != "onnx":
        again = import_model(str(out))
        assert again.config.vocab_size == V
        text_ids = [model.tokenizer.encode(STORY), again.tokenizer.encode(STORY)]
        assert text_ids[0] == text_ids[1] or name == "llama2c"
        assert again.tokenizer.decode(text_ids[1]) == STORY


def test_a_padded_model_is_scored_and_writes(padded: Path, data: Path) -> None:
    storyteller = Storyteller.load(padded, EngineConfig(engine="cpu", precision="fp32"))
    assert evaluate_model(storyteller, str(data)).bits_per_byte > 0
    stories = [storyteller.generate("the", seed=i, max_tokens=8, temperature=9.0) for i in range(20)]
    assert "end" in {story.stop_reason for story in stories}, "an id that is only padding ends a story"
