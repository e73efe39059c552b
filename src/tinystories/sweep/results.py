"""The results of a sweep: a table, results.csv, sweep.png, and best.toml to train with."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.files import atomic_file, write_atomic
from tinystories.sweep.search_space import Categorical, Domain, SearchSpace
from tinystories.sweep.trial import Outcome, read_outcome, trial_dir

if TYPE_CHECKING:
    from optuna.study import Study

STATE_ORDER = ("complete", "pruned", "unfinished", "failed", "invalid")  # sort order of the table
BOUNDARY_FRACTION = 0.03  # a best value within this fraction of the range is at its edge
MIN_TRIALS_TO_CLIP = 4  # the plot clips outliers once this many trials are complete


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


def read_results(study: "Study", space: SearchSpace, folder: Path) -> list[TrialResult]:
    """Return all trials of a sweep, best first: by state (complete trials first), then by bits per byte."""
    domains = {domain.name: domain for domain in space.domains}
    results = []
    for trial in study.get_trials(deepcopy=False):
        settings = {name: domains[name].decode(stored) for name, stored in trial.params.items() if name in domains}
        stored_outcome = trial.user_attrs.get("outcome") if trial.state.is_finished() else None
        outcome = Outcome(**stored_outcome) if stored_outcome else read_outcome(trial_dir(folder, trial.number))
        results.append(TrialResult(trial.number, settings, outcome))
    return sorted(results, key=lambda result: (STATE_ORDER.index(result.outcome.state), result.bits, result.number))


def find_best(results: Sequence[TrialResult]) -> TrialResult | None:
    """Return the complete trial with the fewest bits per byte; None if no trial is complete."""
    return results[0] if results and results[0].outcome.state == "complete" else None


def write_results(folder: Path, space: SearchSpace, results: Sequence[TrialResult]) -> None:
    """Write results.csv and, once a trial is complete, best.toml. `results` are sorted, best first."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    names = list(space.texts)
    writer.writerow(["trial", "state", "bits_per_byte", "step", "tokens", "seconds", *names, "reason"])
    for result in results:
        outcome = result.outcome
        bits = "" if outcome.bits_per_byte is None else outcome.bits_per_byte
        settings = [format_setting(result.settings.get(name, ""), digits=0) for name in names]
        totals = [outcome.step, outcome.tokens, outcome.seconds]
        writer.writerow([result.number, outcome.state, bits, *totals, *settings, outcome.reason])
    write_atomic(folder / "results.csv", buffer.getvalue())
    best = find_best(results)
    if best is not None:
        write_atomic(folder / "best.toml", (trial_dir(folder, best.number) / "config.toml").read_text(encoding="utf-8"))


def format_setting(value: Any, digits: int = 4) -> str:
    """Format a setting as it would be typed. Floats get `digits` significant digits; 0 means all of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value)
    return "|".join(value) if isinstance(value, tuple) else str(value)


def format_table(results: Sequence[TrialResult], names: Sequence[str]) -> str:
    """Format the trials as a table with aligned columns, followed by why trials are not complete."""
    rows = [["trial", "bits/byte", *names, "tokens", "seconds", "state"]]
    for result in results:
        outcome = result.outcome
        bits = "" if outcome.bits_per_byte is None else f"{outcome.bits_per_byte:.4f}"
        settings = [format_setting(result.settings.get(name, "")) for name in names]
        totals = [f"{outcome.tokens:,}", f"{outcome.seconds:,.1f}"]
        rows.append([str(result.number), bits, *settings, *totals, outcome.state])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    reasons = [f"trial {r.number} {r.outcome.state}: {r.outcome.reason}" for r in results if r.outcome.reason]
    return "\n".join([*lines, *[""] * bool(reasons), *reasons])


def at_boundary(best: TrialResult, domains: Sequence[Domain]) -> list[str]:
    """Return the settings whose best value is at the edge of the range, so a wider one may hold a better value."""
    names = []
    for domain in domains:
        if isinstance(domain, Categorical):
            continue
        scale = math.log if domain.log else float
        low, high, value = (scale(number) for number in (domain.low, domain.high, best.settings[domain.name]))
        if min(value - low, high - value) <= BOUNDARY_FRACTION * (high - low):
            names.append(domain.name)
    return names


def plot_results(results: Sequence[TrialResult], domains: Sequence[Domain], path: Path, title: str) -> None:
    """Plot bits per byte against each searched setting as a PNG; write nothing while there are no results.

    Trials far worse than the median are drawn at the upper edge (`clip_threshold`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    finite_results = [result for result in results if math.isfinite(result.bits)]
    if not finite_results:
        return
    columns = min(3, len(domains))
    rows = math.ceil(len(domains) / columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.8 + 3.2 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    ceiling = clip_threshold(finite_results)
    for panel, domain in zip(panels.flat, domains, strict=False):
        plot_panel(panel, finite_results, domain, ceiling, find_best(results))
    for panel in panels.flat[len(domains) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("bits per byte")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with atomic_file(path, sync=False) as file:
        figure.savefig(file, format="png")


def clip_threshold(finite_results: Sequence[TrialResult]) -> float:
    """Return the bits per byte above which trials are drawn at the upper edge; infinity: none are."""
    complete = [result.bits for result in finite_results if result.outcome.state == "complete"]
    if len(complete) < MIN_TRIALS_TO_CLIP:
        return math.inf
    best, median = min(complete), statistics.median(complete)
    return best + 3 * max(median - best, 0.01 * best)


def plot_panel(
    panel: Any, finite_results: Sequence[TrialResult], domain: Domain, ceiling: float, best: TrialResult | None
) -> None:
    """Plot all trials against one setting: complete ones, others, those above `ceiling`, and a ring on the best."""

    def to_point(result: TrialResult) -> tuple[float, float]:
        value = result.settings[domain.name]
        x = domain.values.index(value) if isinstance(domain, Categorical) else value
        return x, min(result.bits, ceiling)

    complete = [r for r in finite_results if r.outcome.state == "complete"]
    groups = [
        ("complete", [r for r in complete if r.bits <= ceiling], {"marker": "o", "color": "#08519c"}),
        (
            "not complete",
            [r for r in finite_results if r not in complete and r.bits <= ceiling],
            {"marker": "x", "color": "#969696"},
        ),
        ("worse than shown", [r for r in finite_results if r.bits > ceiling], {"marker": "^", "color": "#9ecae1"}),
    ]
    for label, group, style in groups:
        if not group:
            continue
        points = [to_point(result) for result in group]
        panel.scatter([x for x, _ in points], [y for _, y in points], s=22, alpha=0.8, label=label, **style)
    if best is not None:
        x, y = to_point(best)
        panel.scatter(
            [x], [y], s=120, marker="o", facecolors="none", edgecolors="#d94801", linewidths=1.6, label="best"
        )
        panel.annotate(f"{best.bits:.3f}", (x, y), (0, -14), textcoords="offset points", ha="center", color="#d94801")
    if isinstance(domain, Categorical):
        panel.set_xticks(range(len(domain.texts)), domain.texts)
        panel.set_xlim(-0.5, len(domain.texts) - 0.5)
    elif domain.log:
        panel.set_xscale("log")
        pad = (domain.high / domain.low) ** BOUNDARY_FRACTION
        panel.set_xlim(domain.low / pad, domain.high * pad)
    else:
        pad = BOUNDARY_FRACTION * (domain.high - domain.low)
        panel.set_xlim(domain.low - pad, domain.high + pad)
    panel.set_xlabel(domain.name)
    panel.margins(y=0.15)
    panel.grid(alpha=0.3)
