"""The model card tells what provenance records, and nothing else."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.formats.bundle import ModelBundle
from tinystories.hub.card import build_model_card
from tinystories.weights.names import expected_shapes

FACTS = {
    "code_version": "0.1.0",
    "data_source": "tinystories",
    "data_revision": "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
    "data_sha256": "084a29729a33",
    "tokenizer": "bpe:400",
    "tokens_seen": 8191608,
    "val_bits_per_byte": 0.671270748053056,
    "val_stories": 4000,
}

Make = Callable[..., ModelBundle]


@pytest.fixture
def make(tiny: Callable[..., ModelConfig], sample_data: Path) -> Make:
    tokenizer = Tokenizer.load(sample_data)
    config = tiny(vocab_size=400, n_kv_head=2)

    def build(**facts: Any) -> ModelBundle:
        sampling = SamplingConfig(temperature=0.65)
        return ModelBundle(config=config, weights={}, tokenizer=tokenizer, sampling=sampling, provenance=facts)

    return build


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_card_tells_what_is_known(make: Make) -> None:
    text = build_model_card(make(**FACTS), "me/stories", "cc0-1.0")
    assert front(text) == {
        "language": "en",
        "license": "cc0-1.0",
        "library_name": "tinystories",
        "pipeline_tag": "text-generation",
        "tags": ["tinystories", "stories"],
        "datasets": ["roneneldan/TinyStories"],
    }
    for told in (
        "| heads | 4, 2 of keys and values |",
        "| tokens seen | 8,191,608 |",
        FACTS["data_revision"],
        "**0.6713 bits per byte** on 4,000 validation stories.",
        "arxiv.org/abs/2305.07759",
        "CDLA-Sharing-1.0",
        "tinystories generate hf:me/stories",
        "temperature 0.65",
    ):
        assert str(told) in text


def test_a_card_invents_nothing(make: Make) -> None:
    text = build_model_card(make())
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}
    for unknown in ("## Training", "## Score", "bits per byte", "licence", "English", "Eldan", "seed", "None"):
        assert unknown not in text


@pytest.mark.parametrize(
    ("source", "datasets", "told"),
    [
        ("tinystories-v2", ["roneneldan/TinyStories"], "CDLA-Sharing-1.0"),
        ("tinystories-clean", ["karpathy/tinystories-gpt4-clean"], "licence: see source"),
        ("hf:someone/tales@v1", ["someone/tales"], "licence: see source"),
        ("sample", None, "licence: CC0-1.0"),
        ("/home/me/secret/train.txt more.txt", None, "| data | train.txt more.txt |"),
        ("hf:bad\nlicense: mit", None, "licence: see source"),
    ],
)
def test_the_data_is_named_by_where_it_is_found(make: Make, source: str, datasets: list[str], told: str) -> None:
    text = build_model_card(make(data_source=source))
    assert front(text).get("datasets") == datasets
    assert "license" not in front(text)
    assert told in text
    assert "secret" not in text


def test_facts_of_any_kind_leave_the_tables_whole(make: Make) -> None:
    text = build_model_card(make(tokenizer="a|b\n# c", seed=[1], tokens_seen=None, val_bits_per_byte="low", epochs=2.5))
    assert "| tokenizer | a/b # c |" in text
    assert "| passes over the data | 2.5 |" in text
    assert "Score" not in text


def test_info_prints_the_card(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(**FACTS)
    weights = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(model.config).items()}
    dataclasses.replace(model, weights=weights).write(tmp_path / "model")
    assert run(cli, ["info", str(tmp_path / "model"), "--card"]) == 0
    assert capsys.readouterr().out == build_model_card(model)
    for words in (["--config", "nano", "--card"], [str(tmp_path / "model"), "--card", "--json"]):
        assert run(cli, ["info", *words]) == 2
