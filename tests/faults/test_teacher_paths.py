"""A run continues with the teachers it was trained with, from wherever it is resumed, and with no others."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config import Config
from tinystories.config_file import load_config
from tinystories.errors import UserError
from tinystories.sweep.search_space import SearchSpace
from tinystories.sweep.study import Plan, merge_plan
from tinystories.train.run import train


@pytest.fixture(scope="module")
def models(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same data that differ only in their seed."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("right", 1), ("wrong", 2)):
        words = "--model.n_ctx 32 --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.n_ff 32 --train.steps 1"
        options = f"--train.seed {seed} --train.device cpu --train.precision fp32 --train.sample_tokens 1"
        assert (
            run(cli, ["train", "--data", str(sample_data), "--out", str(folder / name), *f"{words} {options}".split()])
            == 0
        )
    return folder


@pytest.fixture
def home(config: Config, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model `teacher`, and the run `runs/a` that it has taught by its relative path."""
    home = tmp_path / "home"
    shutil.copytree(models / "right", home / "teacher")
    monkeypatch.chdir(home)
    train(taught(config), Path("runs/a"))
    return home


@pytest.fixture
def elsewhere(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which another model is called `teacher`."""
    shutil.copytree(models / "wrong", tmp_path / "elsewhere" / "teacher")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def taught(config: Config, **settings: object) -> Config:
    values = {"teacher": ("teacher",), "teacher_weight": 5.0, "eval_every": 9, "sample_prompts": (), **settings}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))  # type: ignore[arg-type]


def resume(out: Path | str, *more: str) -> int:
    return run(cli, ["train", "--out", str(out), "--resume", "--train.steps", "6", *more])


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def edit_clocks(out: Path, **values: object) -> None:
    for path in (out / "checkpoints").glob("*/state/clock.json"):
        clock = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in (clock | values).items() if value is not None}))


@pytest.fixture
def expected(home: Path) -> bytes:
    """The weights after resuming from the folder in which the run began."""
    shutil.copytree("runs/a", "runs/same")
    assert resume("runs/same") == 0
    return weights(home / "runs" / "same")


def test_from_another_folder(home: Path, expected: bytes, elsewhere: Path) -> None:
    """The reported case: the model of the same name in the current folder was used."""
    assert elsewhere == Path.cwd()
    assert resume(home / "runs" / "a") == 0
    assert weights(home / "runs" / "a") == expected
    assert load_config(home / "runs" / "a" / "config.toml").train.teacher == ("teacher",)


def test_from_a_folder_without_such_a_model(
    home: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative: it was not found."""
    monkeypatch.chdir(tmp_path)
    assert resume(home / "runs" / "a") == 0
    assert weights(home / "runs" / "a") == expected


def test_the_command_that_began_the_run_repeated_elsewhere(home: Path, expected: bytes, elsewhere: Path) -> None:
    """A relative: the path is on the command line."""
    assert elsewhere == Path.cwd()
    assert resume(home / "runs" / "a", "--train.teacher", "teacher") == 0
    assert weights(home / "runs" / "a") == expected


def test_a_teacher_that_has_been_trained_on(home: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative: the same path with other weights."""
    shutil.rmtree(home / "teacher")
    shutil.copytree(models / "wrong", home / "teacher")
    assert resume("runs/a") == 2
    assert last_line(capsys) == (
        f"error: train.teacher: runs/a was trained with {home}/teacher, which is not there or has other weights now;"
        " put it back, give its new path with --train.teacher DIR, or choose another --out"
    )


def test_a_teacher_that_has_been_moved(
    home: Path, expected: bytes, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (home / "teacher").rename(home / "moved")
    assert resume("runs/a") == 2
    assert f"{home}/teacher, which is not there" in last_line(capsys)
    assert resume("runs/a", "--train.teacher", "moved") == 0
    assert weights(home / "runs" / "a") == expected
    assert "another teacher" not in caplog.text


@pytest.mark.usefixtures("home")
def test_another_teacher_is_the_users_choice(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As docs/training.md says, the teachers may change; a warning says that they have."""
    assert resume("runs/a", "--train.teacher", str(models / "wrong")) == 0
    assert f"runs/a continues with another teacher than before: {models}/wrong" in caplog.text


@pytest.mark.extended
def test_one_of_several_teachers(home: Path, config: Config, models: Path, elsewhere: Path) -> None:
    """A relative: each has its own path and hash."""
    assert elsewhere == Path.cwd()
    run_dir = home / "runs" / "b"
    shutil.copytree(models / "wrong", home / "second")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(taught(config, teacher=("teacher", "second")), run_dir)
        shutil.copytree(run_dir, home / "runs" / "same")
        assert resume(home / "runs" / "same") == 0
    assert resume(run_dir) == 0
    assert weights(run_dir) == weights(home / "runs" / "same")


def test_a_run_of_an_earlier_version(
    home: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative: it stored no path and no hash. The folders above the run are searched."""
    edit_clocks(home / "runs" / "a", teacher_dirs=None, teacher_sha256=None, init_dir=None, init_sha256=None)
    monkeypatch.chdir(tmp_path)
    assert resume(home / "runs" / "a") == 0
    assert weights(home / "runs" / "a") == expected


def test_a_run_of_an_earlier_version_and_two_models(
    home: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_clocks(home / "runs" / "a", teacher_dirs=None, teacher_sha256=None)
    assert resume(home / "runs" / "a") == 2
    assert last_line(capsys) == (
        f"error: train.teacher: {home}/runs/a names teacher, and there are different models of that name:"
        f" {home}/teacher, {elsewhere}/teacher; give --train.teacher with an absolute path"
    )


@pytest.mark.extended
@pytest.mark.parametrize("setting", ["init", "teacher"])
def test_a_run_without_a_checkpoint(home: Path, config: Config, elsewhere: Path, setting: str) -> None:
    """A relative: `train.init` is read only then."""
    values: dict[str, object] = {"teacher": (), "init": "teacher"} if setting == "init" else {}
    run_dir = home / "runs" / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(taught(config, **values), run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match=rf"train\.{setting}: .* there are different models of that name"):
        train(taught(config, **values), run_dir, resume=True)
    shutil.rmtree(elsewhere / "teacher")
    before = weights(run_dir)
    for path in ("metrics.jsonl", "samples.md"):
        (run_dir / path).unlink()
    train(taught(config, **values), run_dir, resume=True)
    assert weights(run_dir) == before


@pytest.mark.extended
@pytest.mark.parametrize("setting", ["init", "teacher"])
def test_the_settings_of_a_run_for_a_new_run(
    home: Path, config: Config, elsewhere: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relative: `train --config RUN/config.toml --out NEW`."""
    values: dict[str, object] = {"teacher": (), "init": "teacher"} if setting == "init" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(taught(config, **values), home / "runs" / "b")
    settings = home / "runs" / "b" / "config.toml"
    assert run(cli, ["train", "--config", str(settings), "--out", "new"]) == 2
    assert last_line(capsys) == (
        f"error: train.{setting}: {settings} is of a training with {home}/teacher, and {elsewhere}/teacher is not that"
        f" model; give --train.{setting} DIR"
    )
    assert run(cli, ["train", "--config", str(settings), "--out", "new", f"--train.{setting}", f"{home}/teacher"]) == 0
    assert weights(Path("new")) == weights(home / "runs" / "b")


def test_a_sweep_stores_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative: the new trials of a resumed sweep. Sweeps that stored relative paths stay resumable."""
    monkeypatch.chdir(tmp_path)
    given = SearchSpace(
        {"data": {"dir": "mine"}, "train": {"teacher": ["a", "b"], "init": "c"}},
        {"optim.learning_rate": "1e-3,1e-2"},
        "a.toml",
    )
    absolute = given.with_absolute_paths()
    assert absolute.base["train"] == {"teacher": [f"{tmp_path}/a", f"{tmp_path}/b"], "init": f"{tmp_path}/c"}
    assert merge_plan(Plan(given), absolute, {}, Path("sweep")).space == absolute
