"""Every command that is printed can be pasted into a shell: names with spaces and quotes are quoted."""

import ast
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinystories import checkpoint
from tinystories.cli.train import train as train_command
from tinystories.config import Config, DataConfig
from tinystories.data.dataset import read_meta
from tinystories.engine.cpu import shortlist
from tinystories.errors import UserError
from tinystories.sweep.runner import format_resume_command
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted

SOURCE = Path(__file__).parents[2] / "src" / "tinystories"
NAMES = ["my run", "it's", 'a "b"', "$HOME; ls", "plain"]


def words_of_command(text: str) -> list[str]:
    """The words of the command at the end of a line, as a shell splits them."""
    return shlex.split(text[text.index("tinystories ") :])


@pytest.mark.parametrize("name", NAMES)
def test_after_training(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The reported case: `done: my run (...). Read a story: tinystories generate my run`."""
    monkeypatch.setattr("tinystories.train.run.train", lambda *_, **__: None)
    train_command.run_training(Config(), Path(name), resume=False)
    assert words_of_command(capsys.readouterr().err) == ["tinystories", "generate", name]


@pytest.mark.parametrize("name", NAMES)
def test_after_an_interrupt(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted(2, 15)

    monkeypatch.setattr("tinystories.train.run.train", interrupt)
    train_command.run_training(Config(), Path(name), resume=False)
    assert words_of_command(capsys.readouterr().err) == ["tinystories", "train", "--out", name, "--resume"]
    assert words_of_command(format_resume_command(Path(name))) == ["tinystories", "sweep", "--out", name, "--resume"]


@pytest.mark.parametrize("name", NAMES)
def test_data_to_prepare_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "from_environment", lambda: SimpleNamespace(size=2))
    config = Config(data=DataConfig(dir=name, source=f"{name}.txt", val=f"{name}.jsonl", tokenizer=f"{name}.json"))
    with pytest.raises(UserError) as caught:
        train_command.ensure_prepared(config)
    words = words_of_command(str(caught.value))
    assert words[:3] == ["tinystories", "prepare", f"{name}.txt"]
    assert words[3:] == ["--tokenizer", f"{name}.json", "--out", name, "--val", f"{name}.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_messages_about_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("stories", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_meta(path)
    assert words_of_command(str(caught.value))[2] == str(path)
    files: Any = SimpleNamespace(folder=tmp_path / f"{name} model", config=SimpleNamespace(vocab_size=9000))
    with pytest.raises(UserError) as caught:
        shortlist.read_shortlist(files)
    assert words_of_command(str(caught.value))[2] == str(files.folder)
    assert words_of_command(checkpoint.import_command(path))[2] == str(path)


# Values that contain no character that a shell interprets: names checked by a regular expression, numbers, flags.
SAFE = {
    "preset",
    "flags",
    "repository",
    "repo",
    "model",
    "n",
    "command",
    "import_command(path)",
    "import_command(folder)",
}


def unquoted_values(source: str) -> list[str]:
    """What f-strings put into a command `tinystories NAME ...` without `shlex`."""
    values = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
                continue
            assert isinstance(part, ast.FormattedValue)
            expression = ast.unparse(part.value)
            in_command = re.search(r"(?:tinystories (?:[a-z]+) |python gpt\.py )[^`;()]*$", text)
            if in_command and not expression.startswith("shlex.") and expression not in SAFE:
                values.append(expression)
            text += "X"
    return values


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_command_in_the_source_has_an_unquoted_value(path: Path) -> None:
    assert unquoted_values(path.read_text(encoding="utf-8")) == []


def test_the_rule_reports_planted_commands() -> None:
    assert unquoted_values('f"run: tinystories generate {out}"') == ["out"]
    assert unquoted_values("f\"tinystories train --config {out / 'x'} --out {shlex.quote(a)}\"") == ["out / 'x'"]
    assert unquoted_values('f"tinystories train --out {shlex.quote(out)} --steps {n}; see {out}"') == []
