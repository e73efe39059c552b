"""Model directories: round trips are exact, damage is detected, incomplete directories are never read as models."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.torch_engine import load_weights
from tinystories.errors import UserError, quoted
from tinystories.files import atomic_directory
from tinystories.model import GPT


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "n_ctx": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_ff": 32}
    return GPT(ModelConfig(**(shape | changes)))  # type: ignore[arg-type]


def write(folder: Path, model: GPT, data: Path) -> Path:
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(data), SamplingConfig(top_k=7), {"step": 3})
    return folder


@pytest.fixture
def folder(tmp_path: Path, sample_data: Path) -> Path:
    return write(tmp_path / "model", tiny(), sample_data)


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_model_is_read_back_unchanged(
    tmp_path: Path, sample_data: Path, architecture: str, tied: bool
) -> None:
    model = tiny(architecture=architecture, tied=tied)
    files = checkpoint.read_model(write(tmp_path / "model", model, sample_data))
    assert files.config == model.config
    assert files.sampling == SamplingConfig(top_k=7)
    assert files.provenance == {"step": 3}
    assert files.tokenizer().sha256 == Tokenizer.load(sample_data).sha256
    torch.manual_seed(99)
    other = GPT(files.config)
    load_weights(files, other)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=0, atol=0)
    assert (other.lm_head.weight is other.embed_tokens.weight) == tied


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation.json"])
def test_altered_file_is_detected(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} does not match its checksum"):
        checkpoint.read_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation.json", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        checkpoint.read_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"model": []}, "model"),
        ({"model": {"n_head": 5}}, "n_head"),
        ({"model": {"n_heads": 3}}, "unknown setting"),
        ({"files": {}}, "checksums"),
        ({"files": {"model.safetensors": "0", "../../etc/passwd": "0"}}, "checksum|outside"),
    ],
)
def test_a_hostile_config_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(UserError, match=message):
        checkpoint.read_model(folder)


def test_file_name_outside_the_directory_is_refused(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["files"] = {"../model/model.safetensors": "0"} | described["files"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="outside the model directory"):
        checkpoint.read_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_garbled_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoint.read_model(folder)


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"n_layer": 3}, {"tied": False}])
def test_weights_of_another_shape_are_refused(folder: Path, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_weights(checkpoint.read_model(folder), tiny(**change))


def test_missing_directory_and_missing_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        checkpoint.read_model(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoint.read_model(tmp_path)


def test_failed_write_keeps_the_old_directory_and_leaves_no_trace(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def fail_half_way() -> None:
        with atomic_directory(folder) as draft:
            (draft / "model.safetensors").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["model.draft", "model.former.draft", ".model.draft"])
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_staging_does_not_touch_files_with_similar_names(
    tmp_path: Path, folder: Path, sample_data: Path, name: str, kind: str
) -> None:
    (tmp_path / "precious").mkdir()
    other = tmp_path / name
    if kind == "directory":
        other.mkdir()
        (other / "novel.txt").write_text("long")
    elif kind == "file":
        other.write_text("long")
    else:
        other.symlink_to(tmp_path / "precious")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    write(folder, tiny(n_layer=1), sample_data)
    assert checkpoint.read_model(folder).config.n_layer == 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_failed_rename_keeps_the_old_directory_and_leaves_no_trace(
    folder: Path, sample_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(old: Path, new: Path) -> None:
        if new == folder and "former" not in str(old) and checkpoint.read_json(old / "config.json") != before:
            raise OSError("no")
        replace(old, new)

    before = checkpoint.read_json(folder / "config.json")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write(folder, tiny(n_layer=1), sample_data)
    assert checkpoint.read_model(folder).config.n_layer == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_new_directory_has_default_permissions(folder: Path) -> None:
    (folder.parent / "plain").mkdir()
    assert folder.stat().st_mode == (folder.parent / "plain").stat().st_mode


def test_an_explicit_staging_path_is_emptied_first(tmp_path: Path, sample_data: Path) -> None:
    """Training uses one, and a killed run leaves it behind."""
    (tmp_path / "step.draft").mkdir()
    (tmp_path / "step.draft" / "half").write_text("")
    with atomic_directory(tmp_path / "step", tmp_path / "step.draft") as draft:
        assert draft == tmp_path / "step.draft"
        checkpoint.write_model(draft, tiny(), Tokenizer.load(sample_data), SamplingConfig(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert not (tmp_path / "step" / "half").exists()


@pytest.mark.parametrize(
    "value",
    ["plain", "\x1b[31m\n\u202e", "x" * 10**6, 10**5000, [10**5000], {"a": ["b"] * 1000}],
    ids=["plain", "escapes", "long", "digits", "digits in a list", "parts"],
)
def test_quoted_text_is_short_and_escaped(value: object) -> None:
    assert quoted(value).isprintable()
    assert len(quoted(value)) <= 60
    assert quoted("plain") == "'plain'"


def test_a_name_of_300_characters_is_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: File name too long|no such model directory"):
        checkpoint.read_model(tmp_path / ("x" * 300))
    described = json.loads((folder / "config.json").read_text())
    described["files"]["x" * 300] = "0"
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"file 'x+\.\.\. (cannot be read: File name too long|is missing)"):
        checkpoint.read_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation.json"])
def test_devices_and_endless_files_are_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"no config\.json|is missing"):
        checkpoint.read_model(folder)
    with pytest.raises(UserError, match="not a regular file"):
        checkpoint.read_json(folder / name)


def test_only_complete_checkpoints_are_listed(tmp_path: Path, folder: Path) -> None:
    for name in ("step-0000010", "step-0000020", "step-0000030.draft", "step-x"):
        shutil.copytree(folder, tmp_path / "run" / "checkpoints" / name)
    (tmp_path / "run" / "checkpoints" / "step-0000020" / "config.json").unlink()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run")] == [10]


def test_publishing_makes_the_run_a_model(tmp_path: Path, folder: Path, sample_data: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.publish(folder, run)
    checkpoint.publish(folder, run)
    other = write(tmp_path / "other", tiny(n_layer=1), sample_data)
    checkpoint.publish(other, run)
    assert checkpoint.read_model(run).config.n_layer == 1
    assert checkpoint.read_model(folder).config.n_layer == 2
    assert not list(run.glob("*.draft"))


def test_publishing_copies_if_links_are_not_supported(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.publish(folder, run)
    assert checkpoint.read_model(run).config == checkpoint.read_model(folder).config
