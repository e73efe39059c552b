"""The original program's three commands: gpt.py, generate.py, sample.py."""

import subprocess
from pathlib import Path

import pytest
from command_line import ROOT, run_python

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.cli.write import original
from tinystories.config_file import load_config

pytestmark = pytest.mark.extended


def script(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_python(str(ROOT / name), *words, cwd=cwd)


@pytest.fixture(scope="module")
def workplace(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `gpt.py` has trained a tiny classic model and has written."""
    cwd = tmp_path_factory.mktemp("original")
    shape = "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 64 --model.vocab_size 0"
    steps = "--train.steps 4 --train.batch_size 4 --train.micro_batch 4 --train.device cpu"
    result = script("gpt.py", "--data", str(sample_data), *shape.split(), *steps.split(), "--tokens", "150", cwd=cwd)
    assert result.returncode == 0, result.stderr
    written = (cwd / "generated.txt").read_text(encoding="utf-8")
    assert written.removesuffix("\n<|endoftext|>\n") == result.stdout.removesuffix("\n")
    assert "150 tokens" in result.stderr
    assert (cwd / "runs" / "seed-89m" / "model.safetensors").exists()
    return cwd


def test_gpt_trains_then_writes_and_then_only_writes(workplace: Path, sample_data: Path) -> None:
    before = (workplace / "runs" / "seed-89m" / "model.safetensors").stat().st_mtime_ns
    words = ["--data", str(sample_data), "--tokens", "20", "--text", "again.txt"]
    settings = (workplace / "runs" / "seed-89m" / "config.toml").rename(workplace / "saved.toml")
    settings.rename(workplace / "runs" / "seed-89m" / "config.toml")
    again = script("gpt.py", "--config", "runs/seed-89m/config.toml", "--out", "runs/seed-89m", *words, cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert "20 tokens" in again.stderr
    assert (workplace / "runs" / "seed-89m" / "model.safetensors").stat().st_mtime_ns == before


def test_the_path_of_the_text_is_checked_before_training(sample_data: Path, tmp_path: Path) -> None:
    for name, why in (("story.md", "must end in .txt or .jsonl"), ("nowhere/story.txt", "folder nowhere")):
        result = script("gpt.py", "--config", "nano", "--data", str(sample_data), "--text", name, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert why in result.stderr
    assert not list(tmp_path.iterdir())


def test_generate_writes_500_tokens(workplace: Path) -> None:
    result = script("generate.py", "--seed", "3", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert "500 tokens" in result.stderr
    assert len(result.stdout) > 100


def test_sample_prints_what_generate_writes(workplace: Path) -> None:
    words = ["--seed", "3", "--tokens", "40", "--prompt", "A bird"]
    assert script("sample.py", *words, cwd=workplace).stdout == script("generate.py", *words, cwd=workplace).stdout


@pytest.mark.parametrize("name", ["generate.py", "sample.py"])
def test_without_a_trained_model_the_bundled_storyteller_writes(name: str, tmp_path: Path) -> None:
    words = ["--seed", "3", "--tokens", "30", "--prompt", "A bird"]
    result = script(name, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == script(name, *words, "--model", str(BUNDLED_MODEL), cwd=tmp_path).stdout
    assert result.stdout.startswith("A bird")
    note, summary = result.stderr.splitlines()
    assert "no trained model in runs/seed-89m" in note
    assert "using the bundled storyteller" in note
    assert "30 tokens" in summary


@pytest.mark.parametrize("name", ["generate.py", "sample.py"])
def test_a_named_model_that_is_missing_is_an_error(name: str, tmp_path: Path) -> None:
    result = script(name, "--model", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "nowhere: no such model directory" in result.stderr


@pytest.mark.parametrize("name", ["gpt.py", "generate.py", "sample.py"])
def test_each_script_has_help_and_one_line_errors(name: str, tmp_path: Path) -> None:
    assert "Usage: python" in script(name, "--help", cwd=tmp_path).stdout
    wrong = script(name, "--tokens", "none", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1


def test_a_run_of_more_than_a_day_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinystories.train.estimate.estimate_train_seconds", lambda *_: 40.0 * 24 * 3600)
    assert original.confirm_long_run(load_config("seed-89m"), tmp_path, ask=False)
    told = capsys.readouterr().err
    assert "about 40 days" in told
    assert "--config nano" in told
    monkeypatch.setattr("tinystories.train.estimate.estimate_train_seconds", lambda *_: 3600.0)
    assert original.confirm_long_run(load_config("nano"), tmp_path, ask=False)
    assert capsys.readouterr().err == ""
