"""`tinystories sweep`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinystories.cli.command import SETTINGS, json_option
from tinystories.cli.train import dotted_overrides, ensure_prepared
from tinystories.config import PRESETS, Config, read_toml
from tinystories.errors import UserError
from tinystories.train.distributed import World

if TYPE_CHECKING:
    from tinystories.train.space import Space
    from tinystories.train.study import Plan


@click.command(context_settings=SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    "--config", "config_file", default="nano", show_default=True, help=f"TOML file, or a preset: {', '.join(PRESETS)}."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder made by `tinystories prepare`.")
@click.option("--out", type=click.Path(path_type=Path), help="Sweep folder.  [default: runs/NAME-sweep of the config]")
@click.option("--trials", type=click.IntRange(min=1), help="In all, those done before too.  [default: 20; a grid: all]")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Trials at the same time.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid"]),
    help="tpe: near what was good (Bayesian); random; grid: every combination.  [default: tpe]",
)
@click.option(
    "--prune",
    type=click.Choice(["none", "median", "hyperband"]),
    help="Stop trials whose evaluations on the way are worse than others' were.  [default: none]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the sampler (train.seed is the trials').  [default: 0]")
@click.option("--resume", is_flag=True, help="Go on with the sweep in --out; its settings are stored there.")
@click.option("--show", is_flag=True, help="Print the table of the sweep in --out, which may be running, and stop.")
@json_option
@click.pass_context
def sweep(
    context: click.Context,
    /,
    config_file: str,
    data: Path | None,
    out: Path | None,
    workers: int,
    resume: bool,
    show: bool,
    as_json: bool,
    **plan: Any,
) -> int:
    """Search settings for the fewest bits per byte: many trainings, each a run directory of its own.

    \b
    A setting with several values is searched, one with a single value is fixed:
      --optim.learning_rate 1e-4:1e-2:log    a range, on a logarithmic scale
      --schedule.warmup 0:0.2                a range
      --model.n_embd 64:256:32               every 32nd number of a range
      --train.batch_size 8,16,32             a list
      --data.dir choose:data/a,data/b        a list of free text, which may hold , and : itself
      --train.steps 500                      fixed
    All settings: tinystories train --help

    \b
    For example 20 trials, 2 at a time, and later 20 more:
      tinystories sweep --config nano --data data/sample --out runs/rates --trials 20 --workers 2 \\
        --optim.learning_rate 3e-4:3e-2:log --train.batch_size 8,16,32 --train.steps 300
      tinystories sweep --out runs/rates --resume --trials 40
      tinystories train --config runs/rates/best.toml --out runs/best

    Trials are compared by the bits per byte of the whole validation set after their last step. Ctrl-C saves them and
    says how to go on. The sweep folder holds results.csv, sweep.png, best.toml, sweep.db (Optuna's) and trial-NNNN.
    """
    from tinystories.train.study import agreed, read_plan
    from tinystories.train.sweep import require_runnable

    if World.from_environment().size > 1:
        raise UserError("a sweep starts its processes itself: start it without torchrun, with --workers N")
    out = out or Path("runs") / f"{Path(config_file).stem}-sweep"
    stored = read_plan(out)
    if show and stored is not None:
        return tell(out, as_json)
    if show:
        raise UserError(f"--out {out} holds no sweep to show")
    if stored is not None and not resume:
        raise UserError(f"--out {out} already holds a sweep; add --resume to go on, or name another directory")
    overrides = dotted_overrides(context) | ({"data.dir": str(data)} if data else {})
    given = context.get_parameter_source("config_file") is not click.core.ParameterSource.DEFAULT
    space = read_space_of(config_file, overrides) if stored is None or overrides or given else None
    if space is not None and (stored is None or space.texts):
        space.example()
    asked = {name: value for name, value in plan.items() if value is not None}
    agreed_plan = agreed(stored, space, asked, out)
    example = agreed_plan.space.example()
    if data is None and agreed_plan.space.data_folders(example) == [example.data.dir]:
        ensure_prepared(example)
    require_runnable(agreed_plan, example)
    return search(out, agreed_plan, example, workers, as_json)


def read_space_of(config_file: str, overrides: dict[str, str]) -> "Space":
    from tinystories.train.space import read_space

    return read_space(read_toml(config_file), config_file, overrides)


def search(out: Path, plan: "Plan", example: Config, workers: int, as_json: bool) -> int:
    """Run the trials and tell what they found; returns the exit code."""
    from tinystories.train.sweep import Stopped, sweep

    try:
        sweep(out, plan, example, workers)
    except Stopped as stop:
        click.echo(f"{stop}; saved. Go on with: tinystories sweep --out {out} --resume", err=True)
        return 128 + stop.signal
    return tell(out, as_json)


def tell(out: Path, as_json: bool) -> int:
    """Print the table of a sweep and what to do next."""
    from tinystories.train.results import at_the_end, best_of, read_results, table
    from tinystories.train.study import open_study, plan_of

    study = open_study(out)
    plan = plan_of(study)
    assert plan is not None, "the plan was read before"
    results = read_results(study, plan.space, out)
    best = best_of(results)
    click.echo(table(results, list(plan.space.texts)))
    files = [name for name in ("results.csv", "sweep.png", "best.toml") if (out / name).exists()]
    click.echo(f"\n{out}: {', '.join(files)}")
    for name in at_the_end(best, plan.space.domains) if best else []:
        click.echo(f"the best {name} lies at an end of {plan.space.texts[name]}: there may be a better one beyond")
    if best is None:
        click.echo("no trial is complete yet")
    else:
        click.echo(
            f"best: trial {best.number}, {best.bits:.4f} bits per byte. Train with its settings:"
            f" tinystories train --config {out / 'best.toml'} --out runs/best"
        )
    if as_json:
        trials = [{"trial": r.number, "settings": r.settings} | dataclasses.asdict(r.outcome) for r in results]
        for trial in trials:
            del trial["settings_to_blame"]
        click.echo(json.dumps({"out": str(out), "best": trials[0] if best else None, "trials": trials}))
    return 0
