"""`--json` of every command that has it: stdout is one JSON object and nothing else, and stderr has the rest."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.errors import UserError

pytestmark = pytest.mark.extended

SIZES = "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 32"
STEPS = "--train.steps 2 --train.batch_size 2 --train.micro_batch 2 --train.sample_tokens 2 --train.device cpu"
SPEED = f"{BUNDLED_MODEL} --runs 1 --threads 1 --only tinystories:int8"
# The words after each command (DATA is a prepared folder), a key of its JSON, and a part of its report on stderr.
CALLS = {
    "prepare": ("sample --tokenizer bpe:300 --out prepared", "mb_per_s", "wrote prepared in"),
    "train": (f"--data DATA --out run {SIZES} {STEPS}", "bits_per_byte", "done: run"),
    "train --print-config": ("", "model", "[model]"),
    # Nothing is trained: the first two combinations of the grid are invalid.
    "sweep": (
        "--data DATA --out sweep --sampler grid --trials 2 --model.n_head 7,2 --model.n_embd 16,32",
        "trials",
        "no trial is complete yet",
    ),
    "eval": ("--data sample --limit 2 --engine cpu --precision int8", "bits_per_byte", "nats per token"),
    "eval --tasks": ("characters --data sample --engine cpu --precision int8", "tasks", "sentence alone"),
    "trace": ("--text Once --out pictures", "mean_bits", "tokens, mean surprise"),
    "info": ("", "parameters", ""),
    "bench decode": (f"{SPEED} --tokens 2 --prompt-tokens 2", "decode", '"same ids": share'),
    "bench batch": (f"{SPEED} --tokens 2 --streams 2", "batch", '"same ids": share'),
    "bench startup": (SPEED, "seconds", "whole process"),
}


def commands_with_json(group: click.Group, prefix: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands_with_json(command, f"{prefix}{name} ")
        elif any("--json" in option.opts for option in command.params):
            yield prefix + name


def test_every_command_with_json_is_called_here() -> None:
    assert set(commands_with_json(cli)) == CALLS.keys() - {"train --print-config", "eval --tasks"}


@pytest.mark.parametrize("command", CALLS)
def test_stdout_is_exactly_one_json_object(
    command: str,
    sample_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words, key, report = CALLS[command]
    arguments = [str(sample_data) if word == "DATA" else word for word in words.split()]
    assert run(cli, [*command.split(), *arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    assert key in json.loads(out)
    assert out.count("\n") == 1
    assert report in err


def test_stdout_stays_empty_after_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        print("a line of another package")  # noqa: T201
        raise UserError("out of luck")

    monkeypatch.setattr("tinystories.evaluate.report.evaluate_model", fail)
    assert run(cli, ["eval", "--data", "sample", "--engine", "cpu", "--json"]) == 2
    assert capfd.readouterr() == ("", "a line of another package\nerror: out of luck\n")
