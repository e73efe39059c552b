"""Output never fails because of an encoding: what a terminal cannot show is escaped, and files are always UTF-8."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tinystories.cli.common import run
from tinystories.data.staging import read_json, write_json
from tinystories.errors import UserError
from tinystories.generate.batching import Story
from tinystories.generate.output import StoryWriter

FOX = "The fox \U0001f98a said “café” \udce9."  # the last character stands for a byte that is not UTF-8


def run_printing(command: click.Command, encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bytes, bytes]:
    """Return the exit code of a command, and what it prints to stdout and stderr: of this encoding, and strict."""
    buffers = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as patch:
        streams = [io.TextIOWrapper(buffer, encoding=encoding, write_through=True) for buffer in buffers]
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = run(command, [])
    return code, buffers[0].getvalue(), buffers[1].getvalue()


@click.command()
def tell() -> None:
    click.echo(FOX)
    click.echo(FOX, err=True)


@click.command()
def fail() -> None:
    raise UserError(f"{FOX} cannot be read")


ENCODINGS = pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "cp437", "shift_jis", "utf-8"])


@ENCODINGS
def test_a_story_is_printed_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run_printing(tell, encoding, monkeypatch)
    assert code == 0
    for printed in (out, err):
        assert printed.startswith(b"The fox ")
        assert printed.endswith((b".\n", b".\r\n"))


@ENCODINGS
def test_an_error_message_is_printed_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_printing(fail, encoding, monkeypatch)
    assert code == 2
    assert err.startswith(b"error: The fox ")


def test_only_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = run_printing(tell, "cp1252", monkeypatch)
    assert out.decode("cp1252").strip() == "The fox \\U0001f98a said “café” \\udce9."


def test_streams_replaced_by_other_objects_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    assert run(click.Command("nothing", callback=lambda: None), []) == 0


@pytest.mark.parametrize("name", ["s.txt", "s.jsonl"])
def test_story_files_are_utf8(name: str, tmp_path: Path) -> None:
    story = Story(
        prompt="The fox \U0001f98a",
        continuation=" said “café”.",
        ids=(1,),
        stop_reason="end",
        n_prompt=1,
        seed=1,
        number=0,
        seconds=1.0,
    )
    with StoryWriter(tmp_path / name) as writer:
        writer.write(story)
    assert story.text.encode() in (tmp_path / name).read_bytes()


def test_records_of_prepare_hold_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    for value in ({"name": "caf\udce9"}, {"name": "café"}, {"name": "\udcf0\udc9f\U0001f98a"}):
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json") == value


@pytest.mark.extended
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},  # the reported case: redirected output on Windows
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
    ids=str,
)
def test_generate_finishes_its_story_in_every_locale(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    prompt = "The fox" if "LC_ALL" in environment else "The fox \U0001f98a"  # arguments are ASCII in the C locale
    words = ["generate", "--prompt", prompt, "--max-tokens", "4", "--seed", "1", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tinystories", *words], env=os.environ | environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"The fox")
    assert json.loads(out.read_text(encoding="utf-8"))["text"].startswith(prompt)
