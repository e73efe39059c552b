"""`tinystories train`."""

import dataclasses
import difflib
import shlex
from pathlib import Path
from typing import Any

import click

from tinystories.cli.common import CONTEXT_SETTINGS, json_option
from tinystories.cli.train.prepare import describe_preparation
from tinystories.config import Config
from tinystories.config_file import PRESETS, load_config, setting_names, to_toml
from tinystories.errors import UserError
from tinystories.files import os_errors, write_errors
from tinystories.train.distributed import World


class SettingsCommand(click.Command):
    """A click command whose --help also lists every `--SECTION.KEY` setting with its default."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        nano = load_config("nano")
        for section in (field.name for field in dataclasses.fields(nano)):
            rows, settings = [], getattr(nano, section)
            for field in dataclasses.fields(settings):
                value = getattr(settings, field.name)
                default_text = " | ".join(value) if isinstance(value, tuple) else str(value)
                default_text = str(value).lower() if isinstance(value, bool) else default_text or "empty"
                rows.append((f"--{section}.{field.name}", f"{field.metadata['help']}  [{default_text}]"))
            with formatter.section(f"Settings of [{section}], with the values of preset nano"):
                formatter.write_dl(rows)


@click.command(
    cls=SettingsCommand, context_settings=CONTEXT_SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option(
    "--config", "config_file", default="nano", show_default=True, help=f"TOML file, or a preset: {', '.join(PRESETS)}."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder written by `tinystories prepare`.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/NAME of --config]")
@click.option("--resume", is_flag=True, help="Resume from the last checkpoint in --out.")
@click.option("--print-config", is_flag=True, help="Print the resolved settings as TOML and exit.")
@json_option
@click.pass_context
def train(
    context: click.Context,
    config_file: str,
    data: Path | None,
    out: Path | None,
    resume: bool,
    print_config: bool,
) -> dict[str, Any] | int:
    """Train a model. Settings come from --config; any --SECTION.KEY VALUE below overrides them.

    \b
    Ctrl-C saves a checkpoint and prints how to resume. The run directory is a model:
      tinystories generate runs/nano          read its stories
      tinystories eval runs/nano --data FILE  measure its bits per byte
    It also holds loss.png, samples.md, metrics.jsonl and config.toml.
    """
    from tinystories.train.run_data import check_recorded_models

    out = out or Path("runs") / Path(config_file).stem
    overrides = parse_overrides(context)
    saved_config = out / "config.toml"
    has_config_flag = context.get_parameter_source("config_file") is not click.core.ParameterSource.DEFAULT
    with write_errors(f"--out {out}"):
        has_saved_config = saved_config.exists()
    source = saved_config if resume and not has_config_flag and has_saved_config else config_file
    config = load_config(source, overrides | ({"data.dir": str(data)} if data else {}))
    if print_config:
        click.echo(to_toml(config), nl=False)
        return dataclasses.asdict(config)
    if resume and not has_saved_config and World.from_environment().is_main:
        click.echo(f"no run in {out} yet: starting a new one", err=True)
    if not resume and config_file not in PRESETS:
        check_recorded_models(Path(config_file), config)
    if data is None:
        check_or_prepare_data(config, out, config_file, resume=resume)
    return run_training(config, out, resume=resume)


def run_training(config: Config, out: Path, *, resume: bool) -> dict[str, Any] | int:
    """Train and print what to do next. Return the result, or an exit code: 128 + n after signal n; 0 in other ranks."""
    from tinystories.data.text_loss import mark_incomparable
    from tinystories.train.loop import Interrupted
    from tinystories.train.run import train

    is_main = World.from_environment().is_main
    try:
        report = train(config, out, resume=resume)
    except Interrupted as stop:
        if not is_main:
            return 0  # on an error code, torchrun would kill the main process before it has printed how to resume
        click.echo(f"{stop}; saved. Resume with: tinystories train --out {shlex.quote(str(out))} --resume", err=True)
        return 128 + stop.signum
    if not is_main:
        return 0
    if report is not None:
        summary = f"{report.bits_per_byte:.4f} bits per byte on {report.stories:,} validation stories"
        click.echo(mark_incomparable(summary, report.lost_text), err=True)
    command = f"tinystories generate {shlex.quote(str(out))}"
    click.echo(f"done: {out} (loss.png, samples.md). Read a story: {command}", err=True)
    score = dataclasses.asdict(report) if report is not None else {}
    return {"out": str(out), "steps": config.train.steps} | score


def is_finished(run: Path) -> bool:
    """Return whether the run in a run directory has finished: its last step and its final evaluation are recorded."""
    from tinystories.train.recording.metrics import read_records

    records = read_records(run / "metrics.jsonl")
    return bool(records) and bool(records[-1].get("final"))


def check_or_prepare_data(config: Config, out: Path, config_file: str, *, resume: bool) -> None:
    """Check that the data of a run to resume is there; for a new run, prepare its data unless it exists.

    Other data is never prepared in place of that of an existing run: neither for the run itself, nor for a new run with
    the settings that a run or a sweep has stored in `config_file`.
    """
    from tinystories.train.run_data import check_run_data, is_run

    with write_errors(f"--out {out}"):
        is_resumed = resume and is_run(out)
    if is_resumed:
        check_run_data(out, config.data.dir)
        return
    folder = Path(config_file).parent
    is_record = config_file not in PRESETS and any((folder / name).exists() for name in ("checkpoints", "sweep.db"))
    if is_record and not (Path(config.data.dir) / "meta.json").exists():
        raise UserError(f"{config_file} is of a training on {config.data.dir}, which is not here; give --data DIR")
    ensure_prepared(config)


def ensure_prepared(config: Config) -> None:
    """Prepare the data that a config names, unless it exists. `UserError` if several processes would do so at once."""
    folder = Path(config.data.dir)
    with os_errors(folder):
        if (folder / "meta.json").exists():
            return
    if World.from_environment().size > 1:
        words = [config.data.source, "--tokenizer", config.data.tokenizer, "--out", str(folder)]
        if config.data.val:
            words += ["--val", config.data.val]
        command = f"tinystories prepare {shlex.join(words)}"
        raise UserError(
            f"{folder} holds no prepared data; before starting several processes, prepare it once: {command}"
        )
    from tinystories.data.prepare import prepare as prepare_data

    click.echo(
        f"{folder} holds no prepared data yet: preparing {config.data.source} ({config.data.tokenizer})", err=True
    )
    report = prepare_data(config.data.source, folder, val=config.data.val or None, tokenizer=config.data.tokenizer)
    click.echo(describe_preparation(report), err=True)


def parse_overrides(context: click.Context) -> dict[str, str]:
    """Parse what click left over: `--train.steps 40` and `--train.steps=40` become {"train.steps": "40"}."""
    overrides: dict[str, str] = {}
    remaining = list(context.args)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--") or "." not in flag:
            raise UserError(f"unexpected argument {flag}; {suggest_fix(flag, context.command)}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not remaining:
                raise UserError(f"--{name} needs a value")
            value = remaining.pop(0)
        overrides[name] = value
    return overrides


def suggest_fix(argument: str, command: click.Command) -> str:
    """Suggest what was meant by an argument that is neither an option nor a setting."""
    word = argument.removeprefix("--").partition("=")[0]
    if word in PRESETS:
        return f"did you mean --config {word}?"
    flags = [name for option in command.params for name in option.opts if name.startswith("--")]
    flags += [f"--{name}" for name in setting_names()]
    settings = {flag.removeprefix("--").rpartition(".")[2]: flag for flag in reversed(flags)}
    matches = difflib.get_close_matches(word, settings, n=1, cutoff=0.7)
    return f"did you mean {settings[matches[0]]}?" if matches else "settings look like --train.steps 40"
