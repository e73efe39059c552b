"""The results of a sweep: a table, results.csv, sweep.png, and best.toml to train with."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.distributions import CategoricalDistribution

from tinystories.config_file import MAX_TOML_CHARS
from tinystories.data.text_loss import describe_loss, mark_incomparable
from tinystories.figure import plain_text, png_figure
from tinystories.files import read_limited, write_atomic
from tinystories.sweep.search_space import Distribution, SearchSpace
from tinystories.sweep.study import damaged_records, read_trials
from tinystories.sweep.trial import Outcome, read_outcome, trial_dir

STATE_ORDER = ("complete", "pruned", "unfinished", "failed", "invalid")  # sort order of the table
BOUNDARY_FRACTION = 0.03  # a best value within this fraction of the range is at its edge


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A trial: its searched settings and its outcome."""

    number: int
    settings: dict[str, Any]
    outcome: Outcome

    @property
    def bits(self) -> float:
        """Bits per byte of the last evaluation; infinity if there is none."""
        bits = self.outcome.bits_per_byte
        return math.inf if bits is None else bits


def read_results(study: Study, space: SearchSpace, folder: Path) -> list[TrialResult]:
    """Return all trials of a sweep, best first: by state (complete trials first), then by bits per byte.

    `UserError` if the database has damaged records.
    """
    results = []
    trials = read_trials(study, space, folder)
    with damaged_records(folder):
        for trial in trials:
            stored_outcome = trial.user_attrs.get("outcome") if trial.state.is_finished() else None
            outcome = Outcome(**stored_outcome) if stored_outcome else read_outcome(trial_dir(folder, trial.number))
            results.append(TrialResult(trial.number, space.decode(trial.params), outcome))
        return sorted(results, key=lambda result: (STATE_ORDER.index(result.outcome.state), result.bits, result.number))


def find_best(results: Sequence[TrialResult]) -> TrialResult | None:
    """Return the complete trial with the fewest bits per byte; None if no trial is complete."""
    return results[0] if results and results[0].outcome.state == "complete" else None


def write_results(folder: Path, space: SearchSpace, results: Sequence[TrialResult]) -> None:
    """Write results.csv and, once a trial is complete, best.toml and sweep.png. `results` are sorted, best first."""
    buffer = io.StringIO()
    totals = ["bits_per_byte", "step", "tokens", "seconds"]
    writer = csv.writer(buffer)
    writer.writerow(["trial", "state", *totals, *space.texts, "reason"])
    for result in results:
        settings = [format_setting(result.settings.get(name, ""), digits=0) for name in space.texts]
        measured = [getattr(result.outcome, total) for total in totals]
        writer.writerow([result.number, result.outcome.state, *measured, *settings, result.outcome.reason])
    write_atomic(folder / "results.csv", buffer.getvalue())
    best = find_best(results)
    if best is not None:
        write_atomic(folder / "best.toml", read_limited(trial_dir(folder, best.number) / "config.toml", MAX_TOML_CHARS))
        plot_results(results, space, folder / "sweep.png")


def describe_result(result: TrialResult) -> str:
    """Return one line about a finished trial: its settings, and its score or why it has none."""
    outcome = result.outcome
    settings = "  ".join(f"{name} {format_setting(value)}" for name, value in result.settings.items())
    if outcome.state == "complete":
        score = mark_incomparable(f"{outcome.bits_per_byte:.4f} bits per byte", outcome.lost_text)
        return f"trial {result.number}  {settings}: {score} in {outcome.seconds:,.0f} s"
    return f"trial {result.number}  {settings}: {outcome.state} ({outcome.reason})"


def format_setting(value: Any, digits: int = 4) -> str:
    """Format a setting as it would be typed. Floats get `digits` significant digits; 0 means all of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value)
    return "|".join(value) if isinstance(value, tuple) else str(value)


def format_table(results: Sequence[TrialResult], names: Sequence[str]) -> str:
    """Format the trials as a table with aligned columns, followed by why trials are not complete, or not comparable."""
    rows = [["trial", "bits/byte", *names, "tokens", "seconds", "state"]]
    for result in results:
        outcome = result.outcome
        bits = "" if outcome.bits_per_byte is None else f"{outcome.bits_per_byte:.4f}"
        settings = [format_setting(result.settings.get(name, "")) for name in names]
        rows.append(
            [str(result.number), bits, *settings, f"{outcome.tokens:,}", f"{outcome.seconds:,.1f}", outcome.state]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    reasons = [f"trial {r.number} {r.outcome.state}: {r.outcome.reason}" for r in results if r.outcome.reason]
    reasons += [f"trial {r.number}: {describe_loss(r.outcome.lost_text)}" for r in results if r.outcome.lost_text]
    return "\n".join([*lines, *[""] * bool(reasons), *reasons])


def at_boundary(best: TrialResult, distributions: Mapping[str, Distribution]) -> list[str]:
    """Return the settings whose best value is at the edge of the range, so a wider one may hold a better value."""
    names = []
    for name, distribution in distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            continue
        scale = math.log if distribution.log else float
        low, high, value = (scale(number) for number in (distribution.low, distribution.high, best.settings[name]))
        if min(value - low, high - value) <= BOUNDARY_FRACTION * (high - low):
            names.append(name)
    return names


def plot_results(results: Sequence[TrialResult], space: SearchSpace, path: Path) -> None:
    """Plot bits per byte against each searched setting as a PNG; `results` start with a complete trial, the best.

    Trials above three times the distance from the best to the median are drawn at the upper edge: a single diverged
    trial would flatten all others.
    """
    best = results[0].bits
    median = statistics.median(result.bits for result in results if result.outcome.state == "complete")
    ceiling = best + 3 * max(median - best, 0.01 * best)
    scored = [result for result in results if math.isfinite(result.bits)]
    y = [min(result.bits, ceiling) for result in scored]
    colors = ["tab:blue" if result.outcome.state == "complete" else "tab:gray" for result in scored]
    with png_figure(path, (1 + 3.6 * len(space.texts), 4)) as figure:
        figure.suptitle("blue: complete, gray: not complete, orange: the best trial", fontsize="small")
        panels = figure.subplots(1, len(space.texts), sharey=True, squeeze=False)[0]
        panels[0].set_ylabel("bits per byte")
        for panel, (name, distribution) in zip(panels, space.distributions.items(), strict=True):
            panel.set_xlabel(name)
            x = [result.settings[name] for result in scored]
            if isinstance(distribution, CategoricalDistribution):
                x = [plain_text(format_setting(value)) for value in x]
            elif distribution.log:
                panel.set_xscale("log")
            panel.scatter(x, y, s=24, c=colors)
            panel.scatter(x[:1], y[:1], s=120, facecolors="none", edgecolors="tab:orange")
