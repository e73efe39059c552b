"""`tinystories sweep`: hyperparameter search."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tinystories.cli.common import CONTEXT_SETTINGS, json_option
from tinystories.cli.train.train import ensure_prepared, parse_overrides
from tinystories.config_file import PRESETS, read_toml
from tinystories.errors import UserError
from tinystories.train.distributed import World

if TYPE_CHECKING:
    from tinystories.sweep.study import Plan

OUTPUT_FILES = ("results.csv", "sweep.png", "best.toml")


@click.command(context_settings=CONTEXT_SETTINGS | {"ignore_unknown_options": True, "allow_extra_args": True})
@click.option(
    "--config", "config_file", default="nano", show_default=True, help=f"TOML file, or a preset: {', '.join(PRESETS)}."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder written by `tinystories prepare`.")
@click.option("--out", type=click.Path(path_type=Path), help="Sweep folder.  [default: runs/NAME-sweep of --config]")
@click.option("--trials", type=click.IntRange(min=1), help="Total, with finished ones.  [default: 20; grid: all]")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Trials to run in parallel.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid"]),
    help="tpe: Bayesian, near the best trials so far; random; grid: every combination.  [default: tpe]",
)
@click.option(
    "--prune",
    type=click.Choice(["none", "median", "hyperband"]),
    help="Stop a trial early if its evaluations are worse than other trials' were.  [default: none]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sampler (not train.seed).  [default: 0]")
@click.option("--resume", is_flag=True, help="Resume the sweep in --out; its settings are stored there.")
@click.option("--show", is_flag=True, help="Print the table of the sweep in --out, which may be running, and exit.")
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
    **plan_options: Any,
) -> dict[str, Any] | int:
    """Search hyperparameters for the fewest bits per byte. Each trial trains in its own run directory.

    \b
    A setting with several values is searched; a setting with a single value is fixed:
      --optim.learning_rate 1e-4:1e-2:log    a range, on a logarithmic scale
      --schedule.warmup 0:0.2                a range
      --model.n_embd 64:256:32               every 32nd number in a range
      --train.batch_size 8,16,32             a list
      --data.dir choose:data/a,data/b        a list for settings of free text
      --train.steps 500                      fixed
    All settings: tinystories train --help

    \b
    Example: 20 trials, 2 at a time, then 20 more:
      tinystories sweep --config nano --data data/sample --out runs/rates --trials 20 --workers 2 \\
        --optim.learning_rate 3e-4:3e-2:log --train.batch_size 8,16,32 --train.steps 300
      tinystories sweep --out runs/rates --resume --trials 40
      tinystories train --config runs/rates/best.toml --out runs/best

    Trials are compared by bits per byte on the whole validation set after their last step. Ctrl-C saves them and
    prints how to resume. The sweep folder holds results.csv, sweep.png, best.toml, sweep.db (Optuna) and trial-NNNN.
    """
    from tinystories.sweep.runner import check_runnable, run_sweep
    from tinystories.sweep.search_space import parse_search_space
    from tinystories.sweep.study import merge_plan, read_plan

    if World.from_environment().size > 1:
        raise UserError("a sweep starts its own processes: run it without torchrun, with --workers N")
    out = out or Path("runs") / f"{Path(config_file).stem}-sweep"
    stored_plan = plan = read_plan(out)
    if show and plan is not None:
        return print_results(out, plan)
    if show:
        raise UserError(f"--show found no sweep in --out {out}")
    if plan is not None and not resume:
        raise UserError(f"--out {out} already holds a sweep; add --resume to continue it, or choose another directory")
    overrides = parse_overrides(context) | ({"data.dir": str(data)} if data else {})
    space = None
    if plan is None or overrides or context.get_parameter_source("config_file") is ParameterSource.COMMANDLINE:
        space = parse_search_space(read_toml(config_file), config_file, overrides).with_absolute_paths()
    plan = merge_plan(plan, space, {name: value for name, value in plan_options.items() if value is not None}, out)
    example_config = plan.space.find_valid_config()
    if stored_plan is not None:
        require_data(out, plan.space.data_dirs(example_config))
    elif data is None and plan.space.data_dirs(example_config) == [example_config.data.dir]:
        ensure_prepared(example_config)
    check_runnable(plan, example_config)
    stop_signal = run_sweep(out, plan, example_config, workers)
    return 128 + stop_signal if stop_signal else print_results(out, plan)


def require_data(out: Path, data_dirs: list[str]) -> None:
    """Raise `UserError` if the data of the sweep `out` has been moved: other data must not take its place."""
    for folder in data_dirs:
        if not (Path(folder) / "meta.json").exists():
            raise UserError(f"{out} was started on {folder}, which is not here; put it back there to resume")


def print_results(out: Path, plan: "Plan") -> dict[str, Any]:
    """Print the table of a sweep and what to do next; return the results for --json."""
    from tinystories.data.text_loss import mark_incomparable
    from tinystories.sweep.results import at_boundary, find_best, format_table, read_results
    from tinystories.sweep.study import open_study

    results = read_results(open_study(out), plan.space, out)
    best = find_best(results)
    click.echo(format_table(results, list(plan.space.texts)))
    click.echo(f"\n{out}: {', '.join(name for name in OUTPUT_FILES if (out / name).exists())}")
    if best is None:
        click.echo("no trial is complete yet")
    else:
        for name in at_boundary(best, plan.space.distributions):
            edge = f"the best {name} is at the edge of its range {plan.space.texts[name]}"
            click.echo(f"{edge}: a wider range may hold a better one")
        train_command = f"tinystories train --config {shlex.quote(str(out / 'best.toml'))} --out runs/best"
        score = mark_incomparable(f"{best.bits:.4f} bits per byte", best.outcome.lost_text)
        click.echo(f"best: trial {best.number}, {score}. Train with its settings: {train_command}")
    trials = [{"trial": r.number, "settings": r.settings} | dataclasses.asdict(r.outcome) for r in results]
    for trial in trials:
        del trial["settings_to_blame"]
    return {"out": str(out), "best": trials[0] if best else None, "trials": trials}
