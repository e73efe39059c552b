"""The public API of `import tinystories`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tinystories
from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.errors import UserError
from tinystories.files import atomic_directory
from tinystories.model import GPT


@pytest.fixture(scope="module")
def model_folder(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.load(sample_data)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, n_ctx=32, n_layer=1, n_head=2, n_embd=16, n_ff=16))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, tokenizer, SamplingConfig(top_k=40), {})
    return folder


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)


def test_importing_is_light() -> None:
    done = run("import sys, tinystories; print({'torch', 'numpy', 'tokenizers'} & sys.modules.keys())")
    assert done.stdout == "set()\n", done.stderr


def test_every_public_name_is_there() -> None:
    for name in tinystories.__all__:
        assert getattr(tinystories, name) is not None
    assert isinstance(tinystories.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        tinystories.loda  # noqa: B018


def test_load_generates_streams_and_scores(model_folder: Path) -> None:
    storyteller = tinystories.load(str(model_folder), device="cpu")
    assert storyteller.settings == SamplingConfig(top_k=40)
    story = storyteller.generate("Once upon a time", max_tokens=50, seed=1)
    again = tinystories.load(model_folder, device="cpu").generate("Once upon a time", max_tokens=50, seed=1)
    assert story.text == again.text
    assert story.text.startswith("Once upon a time")
    assert "".join(storyteller.stream("Once upon a time", max_tokens=50, seed=1)) == story.continuation


def test_a_story_is_the_same_alone_and_among_others(model_folder: Path) -> None:
    storyteller = tinystories.load(model_folder, device="cpu")
    many = storyteller.generate("The", max_tokens=60, seed=3, num=11)
    assert len({story.ids for story in many}) == 11
    assert storyteller.generate("The", max_tokens=60, seed=3).ids == many[0].ids


def test_score_adds_up_to_what_evaluation_counts(model_folder: Path) -> None:
    storyteller = tinystories.load(model_folder, device="cpu")
    text = "Once upon a time there was a little dog. " * 5
    ids = [storyteller.tokenizer.end_id, *storyteller.tokenizer.encode(text), storyteller.tokenizer.end_id]
    assert len(ids) > 33, "longer than the context"
    (expected,) = sliding_window_logprobs(storyteller.engine, [ids])
    assert sum(score.logprob for score in storyteller.score(text)) == pytest.approx(expected.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "abacus"}, "engine abacus"),
        ({"device": "abacus"}, "device abacus"),
        ({"engine": "torch", "precision": "int8"}, "int8"),
    ],
    ids=str,
)
def test_invalid_load_options_are_refused(model_folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tinystories.load(model_folder, **options)  # type: ignore[arg-type]


def test_load_passes_every_setting_of_the_engine_on(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    monkeypatch.setattr(tinystories.Storyteller, "load", lambda _, config: received.append(config))
    options = {"engine": "cpu", "device": "cpu", "precision": "int4", "n_slots": 3, "threads": 2, "shortlist": True}
    assert options.keys() == {field.name for field in dataclasses.fields(EngineConfig)}
    tinystories.load(model_folder, **options)  # type: ignore[arg-type]
    tinystories.load(model_folder)
    assert received == [EngineConfig(**options), EngineConfig()]  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["no/such/folder", "hf:owner/name", ""])
def test_model_that_is_not_a_directory_is_refused(model: str) -> None:
    with pytest.raises(UserError):
        tinystories.load(model)


def test_without_torch_the_error_says_what_to_install(model_folder: Path) -> None:
    """Blocking the import simulates the base install."""
    done = run(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import tinystories\n"
        f"try: tinystories.load({str(model_folder)!r}, engine='torch')\n"
        "except tinystories.UserError as error: print(error)"
    )
    assert 'pip install "tinystories-gpt[train]"' in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
