"""Files written by commit e574ec6 (a run, its data and config, an int8 model directory) load, resume and export."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import tinystories
from tinystories.checkpoint import read_model
from tinystories.cli import cli
from tinystories.config_file import load_config

WRITTEN = Path(__file__).parent / "written_by_e574ec6"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those files, as the working directory: the run refers to its data as `data`."""
    shutil.copytree(WRITTEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def run(*words: str) -> str:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return done.output


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("engine", "precision"), [("cpu", "fp32"), ("cpu", "int8"), ("torch", "fp32")])
def test_old_run_scores_what_it_recorded(old: Path, engine: str, precision: str) -> None:
    output = run("eval", "run", "--data", "data", "--json", "--engine", engine, "--precision", precision)
    score = json.loads(output.strip().splitlines()[-1])["bits_per_byte"]
    recorded = read_model(old / "run").provenance["val_bits_per_byte"]
    assert score == pytest.approx(recorded, abs=1e-4 if precision == "fp32" else 0.01)


def test_old_run_resumes(old: Path) -> None:
    before = records(old / "run")[:6]
    run("train", "--out", "run", "--resume", "--train.steps", "9")
    after = records(old / "run")
    assert after[:6] == before
    assert [record["step"] for record in after if "loss" in record] == list(range(1, 10))
    assert read_model(old / "run").provenance["step"] == 9


@pytest.mark.parametrize(
    ("kind", "name"), [("hf", "model-hf"), ("gguf", "model.gguf"), ("onnx", "model.onnx")], ids=["hf", "gguf", "onnx"]
)
def test_old_run_is_exported(old: Path, kind: str, name: str) -> None:
    run("export", "run", "--format", kind, "--out", name)
    assert (old / name).exists()


def test_old_int8_directory_keeps_its_settings_and_tells_a_story(old: Path) -> None:
    storyteller = tinystories.load(old / "packed", engine="cpu")
    assert storyteller.settings.repetition_penalty == 1.1
    assert storyteller.generate("Once", seed=1, max_tokens=5).n_generated > 0


def test_old_config_is_read(old: Path) -> None:
    config = load_config(old / "run" / "config.toml")
    assert (config.train.steps, config.model.n_embd, config.optim.kind) == (6, 16, "muon")
    assert config.optim.muon_rate == pytest.approx(0.00354, rel=0.01)
