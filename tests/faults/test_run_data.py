"""A run continues with the data it was trained on: nothing else is fetched, prepared or trained on in its place."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.cli.write.original import gpt
from tinystories.config import Config
from tinystories.config_file import load_config, to_toml
from tinystories.data import prepare as prepare_module
from tinystories.data.prepare import prepare
from tinystories.sweep.search_space import SearchSpace
from tinystories.sweep.study import Plan, merge_plan
from tinystories.train.run import train


@pytest.fixture
def home(config: Config, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data `mine` and a run that was trained on it by its relative path. Nothing may be prepared."""
    home = tmp_path / "home"
    shutil.copytree(sample_data, home / "mine")
    monkeypatch.chdir(home)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, dir="mine")), Path("runs/a"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("data is prepared")

    monkeypatch.setattr(prepare_module, "prepare", refuse)
    monkeypatch.setattr("tinystories.data.prepare.prepare", refuse)
    return home


def resume(out: Path | str, *more: str) -> int:
    return run(cli, ["train", "--out", str(out), "--resume", "--train.steps", "6", *more])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_from_the_same_folder(home: Path) -> None:
    assert resume("runs/a") == 0
    assert load_config(home / "runs" / "a" / "config.toml").data.dir == "mine"


def test_from_another_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reported case: 1.9 GB of other stories were downloaded. The message has the command that works."""
    monkeypatch.chdir(tmp_path)
    assert resume(home / "runs" / "a") == 2
    expected = f"error: {home}/runs/a was trained on {home}/mine, which is not here; give --data {home}/mine"
    assert last_line(capsys) == expected
    assert resume(home / "runs" / "a", "--data", str(home / "mine")) == 0


def test_after_the_data_has_been_moved(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mine").rename(home / "moved")
    assert resume("runs/a") == 2
    assert last_line(capsys) == f"error: runs/a was trained on {home}/mine, which is not here; give --data DIR"
    assert resume("runs/a", "--data", "moved") == 0
    (home / "moved").rename(home / "mine")
    assert resume("runs/a") == 2, "the run has moved on to the other path, where its data no longer is"
    assert f"{home}/moved" in last_line(capsys)


def test_other_data_of_the_same_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.txt").write_text("A cow.<|endoftext|>A pig.<|endoftext|>")
    prepare(tmp_path / "b.txt", tmp_path / "mine", tokenizer="bpe:300", progress=False)
    monkeypatch.chdir(tmp_path)
    assert resume(home / "runs" / "a") == 2
    assert last_line(capsys).endswith(f"give --data {home}/mine")


def test_an_absolute_path_is_found_from_everywhere(
    home: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, home / "runs" / "b")
    monkeypatch.chdir(tmp_path)
    assert resume(home / "runs" / "b") == 0


def test_a_config_that_names_other_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative: `--config` with `--resume` takes the folder of a preset, and that is not there."""
    assert resume("runs/a", "--config", "nano") == 2
    assert last_line(capsys).endswith(f"which is not here; give --data {home}/mine")


def test_the_original_command_continues_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative: `python gpt.py` resumes by itself."""
    assert run(gpt, ["--config", "nano", "--out", "runs/a", "--yes", "--train.steps", "6"]) == 2
    assert last_line(capsys).endswith(f"which is not here; give --data {home}/mine")


def test_the_settings_of_a_run_for_a_new_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative: `train --config RUN/config.toml --out NEW`, with settings that name `tinystories` as the source."""
    (home / "mine").rename(home / "moved")
    assert run(cli, ["train", "--config", "runs/a/config.toml", "--out", "runs/new"]) == 2
    assert last_line(capsys) == (
        "error: runs/a/config.toml is of a training on mine, which is not here; give --data DIR"
    )


def test_a_run_of_an_earlier_version(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It stored the path as it was given: that is looked for in the folders above the run."""
    for path in (home / "runs" / "a" / "checkpoints").glob("*/state/clock.json"):
        clock = json.loads(path.read_text())
        assert clock.pop("data_dir") == str(home / "mine")
        path.write_text(json.dumps(clock))
    assert resume("runs/a") == 0
    for path in (home / "runs" / "a" / "checkpoints").glob("*/state/clock.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_dir": ""}))
    monkeypatch.chdir(home / "runs")
    assert resume("a") == 2
    assert last_line(capsys) == f"error: a was trained on mine, which is not here; give --data {home}/mine"


def test_a_run_without_a_checkpoint(home: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "runs" / "new").mkdir()
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, dir="nowhere"))
    (home / "runs" / "new" / "config.toml").write_text(to_toml(settings))
    assert resume("runs/new") == 2
    assert last_line(capsys) == "error: runs/new was trained on nowhere, which is not here; give --data DIR"
    assert resume("runs/new", "--data", "mine") == 0


def test_a_sweep_stores_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative: resumed from elsewhere, its new trials were trained on what was there. Old sweeps stay resumable."""
    monkeypatch.chdir(tmp_path)
    texts = {"optim.learning_rate": "1e-3,1e-2"}
    given = SearchSpace({"data": {"dir": "mine"}}, texts, "a.toml")
    assert given.with_absolute_paths().base == {"data": {"dir": str(tmp_path / "mine")}}
    searched = SearchSpace({}, texts | {"data.dir": "choose:a,b"}, "a.toml")
    assert searched.with_absolute_paths() == searched
    merged = merge_plan(Plan(given), given.with_absolute_paths(), {}, Path("sweep"))
    assert merged.space == given.with_absolute_paths()


def test_a_sweep_whose_data_was_moved(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinystories.sweep.runner.run_sweep", lambda folder, plan, *_: store_plan(folder, plan))
    words = ["sweep", "--out", "s", "--trials", "1", "--optim.learning_rate", "1e-3,1e-2"]
    run(cli, [*words, "--data", "mine"])
    (home / "mine").rename(home / "moved")
    capsys.readouterr()
    assert run(cli, ["sweep", "--out", "s", "--resume"]) == 2
    assert last_line(capsys) == f"error: s was started on {home}/mine, which is not here; put it back there to resume"


def store_plan(folder: Path, plan: Plan) -> int:
    from tinystories.sweep.study import open_study

    os.makedirs(folder)
    open_study(folder).set_user_attr("plan", plan.to_json())
    return 130
