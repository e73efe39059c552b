"""Pictures, samples and TensorBoard never end a training: what cannot be written is a warning, once."""

import dataclasses
import errno
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import run_python

from tinystories.config import Config
from tinystories.figure import plain_text, png_figure
from tinystories.sweep import runner
from tinystories.train import loop
from tinystories.train.recording import recorder
from tinystories.train.recording.recorder import cut_samples
from tinystories.train.run import train

PNG = b"\x89PNG"
NOTEBOOK_BACKEND = "module://a_module_of_the_notebook.only"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("backend", [NOTEBOOK_BACKEND, "TkAgg", "no such backend", ""])
def test_a_figure_is_drawn_whatever_the_backend_is(backend: str, tmp_path: Path) -> None:
    """The reported case is the backend of notebooks; a display that is not there is its relative."""
    program = "import sys; from pathlib import Path; from tinystories.figure import png_figure\n"
    program += "with png_figure(Path(sys.argv[1]), (2, 2)) as figure: figure.subplots().set_title('a')\n"
    program += "import os; print(os.environ['MPLBACKEND'])"
    done = run_python("-c", program, str(tmp_path / "a.png"), MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert done.stdout.rstrip("\n") == backend, "the processes that this one starts see what they saw before"


@pytest.mark.parametrize("name", ["$x_{$", "a$b$c", r"\$", "it's 100 % \u732b", "tab\there", "\udcff"])
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    with png_figure(tmp_path / "a.png", (2, 2)) as figure:
        title = figure.subplots().set_title(plain_text(name))
        text, is_formula = title._preprocess_math(title.get_text())
    assert not is_formula
    assert text == "".join(char if char.isprintable() else "\ufffd" for char in name)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["write_samples", "plot_curves"])
@pytest.mark.parametrize("error", [fail, NotImplementedError], ids=["full disk", "bug of a library"])
def test_side_work_that_fails_is_one_warning(
    name: str, error: Any, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    def raise_error(*_: object) -> None:
        raise error() if isinstance(error, type) else fail()  # type: ignore[func-returns-value]

    owner = recorder.Recorder if name == "write_samples" else recorder
    monkeypatch.setattr(owner, name, raise_error)
    assert train(config, tmp_path / "run") is not None
    what = "samples.md" if name == "write_samples" else "loss.png"
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{what} cannot be written (")
    assert line.endswith("; everything else continues")


def test_the_checkpoint_comes_first(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the whole process in side work, as of the compiler of the CPU engine, loses no step."""

    def crash(*_: object) -> None:
        raise SystemExit(134)

    monkeypatch.setattr(recorder.Recorder, "write_samples", crash)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]


@pytest.mark.parametrize("broken", ["constructor", "add_scalar", "close"])
def test_tensorboard_may_fail_at_any_call(
    broken: str, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SummaryWriter:
        def __init__(self, *_: object, **__: object) -> None:
            if broken == "constructor":
                fail()

        def add_scalar(self, *_: object) -> None:
            if broken == "add_scalar":
                fail()

        def close(self) -> None:
            if broken == "close":
                fail()

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, tensorboard=True))
    assert train(config, tmp_path / "run") is not None
    assert warnings_of(caplog) == ["tensorboard cannot be written (No space left on device); everything else continues"]


def test_a_samples_file_that_cannot_be_written_keeps_its_sections_whole(config: Config, tmp_path: Path) -> None:
    """A folder in its place: the run goes on; and removed, the next evaluation writes it."""
    (tmp_path / "run").mkdir()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    train(config, tmp_path / "run")
    (tmp_path / "run" / "samples.md").unlink()
    (tmp_path / "run" / "samples.md").mkdir()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    assert train(longer, tmp_path / "run", resume=True) is not None
    (tmp_path / "run" / "samples.md").rmdir()
    longest = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    assert train(longest, tmp_path / "run", resume=True) is not None
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step") == 2


def test_samples_are_cut_at_their_sections(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    path.write_text("## Step 9 (a)\n\n> ## Step 99 (b)\n\n## Step 1,000 (c)\n\n> d\n")
    cut_samples(path, 1000)
    assert path.read_text().endswith("> d\n")
    cut_samples(path, 999)
    assert path.read_text() == "## Step 9 (a)\n\n> ## Step 99 (b)\n\n"
    cut_samples(path, 8)
    assert path.read_text() == ""
    cut_samples(tmp_path / "none.md", 8)


def test_an_evaluation_that_is_repeated_writes_its_samples_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the evaluation of step 2, which had a checkpoint of before the evaluation."""
    with monkeypatch.context() as patch:

        def interrupt(trainer: loop.Trainer, _: int) -> None:
            raise loop.Interrupted(15, trainer.train_state.step)

        patch.setattr(loop.Trainer, "evaluate", interrupt)
        with pytest.raises(loop.Interrupted):
            train(config, tmp_path / "run")
    with monkeypatch.context() as patch:

        def kill(*_: object) -> None:
            raise SystemExit(137)

        patch.setattr(loop.Trainer, "train_step", kill)
        patch.setattr(loop.Trainer, "save_checkpoint", lambda _: None)
        with pytest.raises(SystemExit):
            train(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step 2 ") == 1
    train(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "samples.md").read_text().count("## Step 2 ") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]


def test_the_files_of_a_sweep_are_side_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = object.__new__(runner.SweepRunner)
    sweep.folder, sweep.side_work = tmp_path, runner.SideWork()
    sweep.plan, sweep.study = type("Plan", (), {"space": None})(), None  # type: ignore[assignment]
    monkeypatch.setattr(runner, "read_results", lambda *_: [])
    monkeypatch.setattr(runner, "write_results", fail)
    sweep.write_result_files()
    sweep.write_result_files()
    (line,) = warnings_of(caplog)
    assert "sweep.png cannot be written (No space left on device)" in line


@pytest.mark.extended
def test_a_training_started_by_a_notebook(sample_data: Path, tmp_path: Path) -> None:
    """The reported case as a command; matplotlib's own log lines are not in the log."""
    words = ["train", "--data", str(sample_data), "--out", str(tmp_path / "$a$ run"), "--train.steps", "2"]
    settings = "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 32"
    settings += " --train.batch_size 2 --train.micro_batch 2 --train.sample_tokens 2 --train.device cpu"
    environment = {"MPLBACKEND": NOTEBOOK_BACKEND, "MPLCONFIGDIR": str(tmp_path / "fonts")}
    done = run_python("-m", "tinystories", *words, *settings.split(), **environment)
    assert done.returncode == 0, done.stderr
    assert "font" not in done.stderr.lower()
    assert "cannot be written" not in done.stderr
    assert (tmp_path / "$a$ run" / "loss.png").read_bytes().startswith(PNG)
