"""The search space of a sweep, parsed from the command line: `--optim.learning_rate 1e-4:1e-2:log` and the like.

A searched setting becomes an Optuna distribution: a range of numbers, or a list of texts that are parsed by the type of
their setting (`config.setting_type`), so every setting can be searched.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, get_args, get_origin

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tinystories.config import Config, DataConfig
from tinystories.config_file import UNION_TYPES, build_dataclass, merge_overrides, parse_text, setting_type, validate
from tinystories.errors import UserError

CHOICES_PREFIX = "choose:"
COMMAND_LINE = "command line"
# Combinations tried, of the corners and again of the inside, before the space is refused as having no valid config.
MAX_CANDIDATES = 200
MAX_GRID_SIZE = 100_000
MAX_RANGE_STEPS = 1e9  # values of a range with steps

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The settings of a sweep, both fixed and searched.

    `base`: the tables of settings that all trials share. `texts`: the ranges and lists of the searched settings as
    typed, by dotted name. `where`: the file that `base` comes from, for error messages.
    """

    base: Mapping[str, Any]
    texts: Mapping[str, str]
    where: str

    @property
    def distributions(self) -> dict[str, Distribution]:
        """The distribution of each searched setting, in the order of `texts`."""
        parsed = {name: parse_distribution(name, text, setting_type(name)) for name, text in self.texts.items()}
        return {name: distribution for name, distribution in parsed.items() if distribution is not None}

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for parameters as Optuna stores them: numbers, and list items as texts."""
        return {
            name: parse_value(name, stored, setting_type(name)) if isinstance(stored, str) else stored
            for name, stored in params.items()
            if name in self.texts
        }

    def build_config(self, params: Mapping[str, Any]) -> Config:
        """Return the config of a trial with these Optuna parameters. `UserError` if its settings are contradictory."""
        return build_dataclass(Config, merge_overrides(self.base, self.decode(params), self.where), self.where)

    def find_valid_config(self) -> Config:
        """Return any valid config of the space. `UserError` if none is found: then a fixed setting must be wrong."""
        if not self.texts:
            raise UserError(
                "nothing to search: give a setting several values, as in --optim.learning_rate 1e-4:1e-2:log or"
                " --train.batch_size 8,16"
            )
        errors = []
        for params in self.iter_candidates():
            try:
                return self.build_config(params)
            except UserError as error:
                errors.append(error)
        raise UserError(f"no combination of these settings is a valid config: {errors[0]}")

    def iter_candidates(self) -> Iterator[dict[str, Any]]:
        """Yield parameters of the space: corners first, then random points inside it."""
        distributions = self.distributions
        bounds = (
            d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high) for d in distributions.values()
        )
        for corner in itertools.islice(itertools.product(*bounds), MAX_CANDIDATES):
            yield dict(zip(distributions, corner, strict=True))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(MAX_CANDIDATES):
            yield study.ask(dict(distributions)).params

    def with_absolute_paths(self) -> "SearchSpace":
        """Return this space with absolute paths of fixed data and models, so that it can be resumed from elsewhere."""
        fixed = {name: value for name, value in self.read_paths().items() if name not in self.texts}
        return dataclasses.replace(self, base=merge_overrides(self.base, fixed, self.where))

    def read_paths(self) -> dict[str, Any]:
        """Return the settings that are paths, as absolute ones: the data, the teachers and the initial model."""
        data, train = self.base.get("data", {}), self.base.get("train", {})
        data_dir = data.get("dir", DataConfig().dir) if isinstance(data, Mapping) else None
        init, teachers = (train.get("init"), train.get("teacher")) if isinstance(train, Mapping) else (None, None)
        paths: dict[str, Any] = {}  # without what is invalid, which is reported later
        if isinstance(data_dir, str):
            paths["data.dir"] = os.path.abspath(data_dir)
        if isinstance(init, str) and init:
            paths["train.init"] = os.path.abspath(init)
        if isinstance(teachers, list | tuple) and teachers and all(isinstance(folder, str) for folder in teachers):
            paths["train.teacher"] = [os.path.abspath(folder) for folder in teachers]
        return paths

    def data_dirs(self, config: Config) -> list[str]:
        """Return the folders of prepared data that trials read. `config` is any valid config of the space."""
        searched = self.distributions.get("data.dir")
        return list(list_values("data.dir", searched)) if searched else [config.data.dir]

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination, in the form Optuna stores; the last setting varies fastest.

        `UserError` if a range is continuous or there are more than MAX_GRID_SIZE combinations.
        """
        lists = [list_values(name, distribution) for name, distribution in self.distributions.items()]
        if math.prod(len(values) for values in lists) > MAX_GRID_SIZE:
            raise UserError(f"the grid has more than {MAX_GRID_SIZE:,} combinations; list fewer values")
        return [dict(zip(self.texts, combination, strict=True)) for combination in itertools.product(*lists)]


def list_values(name: str, distribution: Distribution) -> Sequence[Any]:
    """Return all values of a setting. `UserError` if the range is continuous or has more than MAX_GRID_SIZE values."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if distribution.log or distribution.step is None:
        raise UserError(f"--{name} is a range without steps; a grid needs a list, or LOW:HIGH:STEP")
    n_steps = count_steps(distribution.low, distribution.high, distribution.step)
    if n_steps >= MAX_GRID_SIZE:
        raise UserError(f"--{name} has more than {MAX_GRID_SIZE:,} values; a grid needs fewer")
    return [value_at_step(distribution.low, distribution.step, n) for n in range(n_steps + 1)]


def count_steps(low: float, high: float, step: float) -> int:
    """Return how many steps fit between low and high."""
    return int((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step)))


def value_at_step(low: float, step: float, n: int) -> float:
    """Return low + n * step, computed in decimal: 0.1 + 2 * 0.1 is 0.3, not 0.30000000000000004."""
    return type(low)(Decimal(str(low)) + n * Decimal(str(step)))


def parse_search_space(tables: Mapping[str, Any], where: str, overrides: Mapping[str, str]) -> SearchSpace:
    """Split `overrides` (dotted setting: text) into fixed settings, merged over `tables`, and searched ones.

    `where` names the file of `tables` in error messages. `UserError` names the setting that cannot be parsed.
    """
    hints = {name: setting_type(name) for name in overrides}
    searched = {
        name: text for name, text in overrides.items() if parse_distribution(name, text, hints[name]) is not None
    }
    fixed = {name: parse_value(name, text, hints[name]) for name, text in overrides.items() if name not in searched}
    return SearchSpace(merge_overrides(tables, fixed, where), searched, where)


def parse_distribution(name: str, text: str, hint: Any) -> Distribution | None:
    """Parse the range or list of a searched setting; return None for a single value. `hint` is the setting's type.

    Free text may itself contain commas and colons, so for such settings only a list after `choose:` is searched.
    """
    if text.startswith(CHOICES_PREFIX):
        return parse_choices(name, text.removeprefix(CHOICES_PREFIX), hint)
    if hint is str or get_origin(hint) is tuple:
        return None
    if ":" in text:
        return parse_range(name, text, hint)
    return parse_choices(name, text, hint) if "," in text else None


def parse_choices(name: str, text: str, hint: Any) -> CategoricalDistribution:
    """Parse the list A,B,C. `UserError` for empty, repeated or single values."""
    texts = tuple(part.strip() for part in text.split(","))
    if "" in texts:
        raise UserError(f"--{name} {text!r}: empty value in the list; check the commas")
    values = tuple(parse_value(name, part, hint) for part in texts)
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"--{name} {text!r}: {texts[i]} is listed twice")
    if len(values) == 1:
        raise UserError(f"--{name} {text!r} is a single value; list several, or fix it with --{name} {texts[0]}")
    return CategoricalDistribution(texts)


def parse_range(name: str, text: str, hint: Any) -> FloatDistribution | IntDistribution:
    """Parse LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP; the highest value is the last one that the steps reach."""
    number_type = get_args(hint)[0] if get_origin(hint) in UNION_TYPES else hint
    if number_type not in (int, float):
        raise UserError(f"--{name} {text!r}: only numbers can have ranges; list the values, as in --{name} A,B")
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3):
        raise UserError(f"--{name} {text!r}: a range is LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP")
    low, high = (parse_value(name, part, number_type) for part in parts[:2])
    log = parts[2:] == ["log"]
    step = parse_value(name, parts[2], number_type) if len(parts) == 3 and not log else None
    if low > high:
        problem = f"the range is empty; write {high}:{low}"
    elif low == high:
        problem = f"the range is a single value; fix it with --{name} {low}"
    elif log and low <= 0:
        problem = "a range on a logarithmic scale must start above 0"
    elif not math.isfinite(high - low) or (step and (high - low) / step > MAX_RANGE_STEPS):
        problem = "the range is too wide"
    elif step is not None and (step <= 0 or count_steps(low, high, step) < 1):
        problem = f"the step must be above 0 and at most {high - low:g}, or log"
    else:
        if step is not None:
            high = value_at_step(low, step, count_steps(low, high, step))
        if number_type is int:
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)
    raise UserError(f"--{name} {text!r}: {problem}")


def parse_value(name: str, text: str, hint: Any) -> Any:
    """Parse a text to a value of type `hint`. `UserError` names the setting."""
    return validate(parse_text(text, hint, name), hint, COMMAND_LINE, name)
