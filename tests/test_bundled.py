"""The bundled storyteller: small, independent of torch and network, and as good as its card says."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from command_line import run_python
from text_statistics import has_loop

import tinystories
from tinystories.checkpoint import BUNDLED_MODEL, read_model
from tinystories.evaluate.report import evaluate_model

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data" / "valid.txt"

ALONE = """
import socket, sys

def refused(*_):
    raise OSError("no network here")

socket.socket.connect = refused
sys.modules["torch"] = None
from tinystories.cli import main
main(sys.argv[1:])
"""


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", ALONE, *words)


def test_first_command_writes_a_complete_story_without_torch_and_network() -> None:
    done = alone("generate", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "ended by itself" in done.stderr
    assert 40 < len(done.stdout.split()) < 400
    assert done.stdout.strip()[-1] in ".!?\"”'"
    assert alone("generate", "--seed", "1").stdout == done.stdout
    assert alone("generate", "--seed", "2").stdout != done.stdout


def test_stories_in_the_readme_and_the_card_are_what_their_seeds_tell() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"generate --seed (\d+)\n```.*?```\n(.*?)\n```", readme, re.DOTALL)
    assert len(shown) == 1
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^Seed (\d+):\n\n((?:> .*\n)+)", card, re.MULTILINE)
    assert len(quoted) == 5
    shown += [(seed, "\n".join(line.removeprefix("> ") for line in text.splitlines())) for seed, text in quoted]
    storyteller = tinystories.load(engine="cpu")
    for seed, text in shown:
        assert storyteller.generate(seed=int(seed)).text.strip() == text, f"seed {seed}"


def test_bundled_model_is_under_16_mb() -> None:
    assert sum(path.stat().st_size for path in BUNDLED_MODEL.iterdir()) < 16e6


@pytest.mark.extended
def test_bundled_model_scores_what_config_and_card_say() -> None:
    """Scored on the bundled stories, which are not in its training data; TinyStories' own is a slow test."""
    facts, card = read_model(BUNDLED_MODEL).provenance, (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    score = evaluate_model(tinystories.load(precision="int8", engine="cpu"), "sample").bits_per_byte
    assert score == pytest.approx(facts["sample_bits_per_byte"], abs=1e-3)
    for name in ("sample_bits_per_byte", "val_bits_per_byte"):
        assert f"{facts[name]:.4f}" in card, name


@pytest.mark.slow
def test_bundled_model_scores_what_the_card_says_on_tinystories() -> None:
    if not SHARED.is_file():
        pytest.skip("needs TinyStories' validation stories")
    score = evaluate_model(tinystories.load(precision="int8", engine="cpu"), str(SHARED)).bits_per_byte
    assert score == pytest.approx(read_model(BUNDLED_MODEL).provenance["val_bits_per_byte"], abs=1e-3)


@pytest.mark.extended
def test_bundled_model_stories_end_and_do_not_loop() -> None:
    stories = tinystories.load().generate(num=24, seed=5, max_tokens=400)
    assert sum(story.stop_reason == "end" for story in stories) >= 21
    assert sum(has_loop(story.text) for story in stories) <= 1
    assert len({story.text[:60] for story in stories}) >= 10


def test_info_prints_the_card() -> None:
    done = alone("info")
    assert done.returncode == 0, done.stderr
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")  # front matter for the Hub, not printed
    assert done.stdout.endswith(card[card.index("# The bundled storyteller") :])
    assert "pipeline_tag" not in done.stdout
    facts = json.loads(alone("info", "--json").stdout)
    assert facts["parameters"] == read_model(BUNDLED_MODEL).config.n_params
    assert re.search(r"CDLA-Sharing-1\.0", done.stdout)
