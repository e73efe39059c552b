"""The search space of a sweep, parsed from the command line: `--optim.learning_rate 1e-4:1e-2:log` and the like.

Values are parsed by the type of their setting (`config.setting_type`), so every setting can be searched.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, get_args, get_origin

from tinystories.config import Config
from tinystories.config_file import UNION_TYPES, build_dataclass, merge_overrides, parse_text, setting_type, validate
from tinystories.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

CHOICES_PREFIX = "choose:"
COMMAND_LINE = "command line"
# Combinations tried, of the corners and again of the inside, before the space is refused as having no valid config.
MAX_CANDIDATES = 200
MAX_GRID_SIZE = 100_000
MAX_RANGE_STEPS = 1e9  # values of a range with steps


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A choice from a list. Optuna stores the texts, so the values can have any type a setting has."""

    name: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]
    log: bool = False

    def suggest(self, trial: "Trial") -> Any:
        return self.decode(trial.suggest_categorical(self.name, self.texts))

    def decode(self, stored: Any) -> Any:
        """The setting's value for what Optuna stores."""
        return self.values[self.texts.index(stored)]

    def grid_values(self) -> Sequence[Any]:
        return self.values

    def bounds(self) -> Sequence[Any]:
        return self.values

    def sample(self, generator: random.Random) -> Any:
        return generator.choice(self.values)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included. Integers if both are; with `step`, only low + n * step."""

    name: str
    low: int | float
    high: int | float
    step: int | float | None
    log: bool

    def suggest(self, trial: "Trial") -> int | float:
        if isinstance(self.low, int):
            return trial.suggest_int(self.name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def decode(self, stored: Any) -> Any:
        """The setting's value for what Optuna stores."""
        return stored

    def value_at_step(self, n: int) -> int | float:
        """Return low + n * step, computed in decimal: 0.1 + 2 * 0.1 is 0.3, not 0.30000000000000004."""
        return type(self.low)(Decimal(str(self.low)) + n * Decimal(str(self.step or 1)))

    def n_steps(self) -> int:
        """Return how many steps fit between low and high."""
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step or 1)))

    def grid_values(self) -> Sequence[int | float]:
        """Return all values. `UserError` if the range is continuous or has more than MAX_GRID_SIZE values."""
        if self.log or (self.step is None and isinstance(self.low, float)):
            raise UserError(f"--{self.name} is a range without steps; a grid needs a list, or LOW:HIGH:STEP")
        if self.n_steps() >= MAX_GRID_SIZE:
            raise UserError(f"--{self.name} has more than {MAX_GRID_SIZE:,} values; a grid needs fewer")
        return [self.value_at_step(n) for n in range(self.n_steps() + 1)]

    def bounds(self) -> Sequence[int | float]:
        return self.low, self.high

    def sample(self, generator: random.Random) -> int | float:
        if self.step is None and isinstance(self.low, float):
            return generator.uniform(self.low, self.high)
        return self.value_at_step(generator.randint(0, self.n_steps()))


Domain = Categorical | Range


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
    def domains(self) -> list[Domain]:
        """The domains of the searched settings, in the order of `texts`."""
        parsed_domains = [parse_domain(name, text, setting_type(name)) for name, text in self.texts.items()]
        assert all(parsed_domains)
        return [domain for domain in parsed_domains if domain is not None]

    def build_config(self, values: Mapping[str, Any]) -> Config:
        """Return the config of a trial. `UserError` if its settings contradict each other."""
        return build_dataclass(Config, merge_overrides(self.base, values, self.where), self.where)

    def find_valid_config(self) -> Config:
        """Return any valid config of the space. `UserError` if none is found: then a fixed setting must be wrong."""
        if not self.texts:
            raise UserError(
                "nothing to search: give a setting several values, as in --optim.learning_rate 1e-4:1e-2:log or"
                " --train.batch_size 8,16"
            )
        first_error = None
        for values in self.iter_candidates():
            try:
                return self.build_config(values)
            except UserError as error:
                first_error = first_error or error
        assert first_error is not None
        raise UserError(f"no combination of these settings is a valid config: {first_error}")

    def iter_candidates(self) -> Iterator[dict[str, Any]]:
        """Yield values by setting: corners of the space first, then random points inside it."""
        domains = self.domains
        corners = itertools.product(*(domain.bounds() for domain in domains))
        generator = random.Random(0)
        interior = ([domain.sample(generator) for domain in domains] for _ in range(MAX_CANDIDATES))
        for combination in itertools.chain(itertools.islice(corners, MAX_CANDIDATES), interior):
            yield dict(zip(self.texts, combination, strict=True))

    def data_dirs(self, config: Config) -> list[str]:
        """Return the folders of prepared data that trials read. `config` is any valid config of the space."""
        data_domains = [domain for domain in self.domains if domain.name == "data.dir"]
        return [str(folder) for domain in data_domains for folder in domain.grid_values()] or [config.data.dir]

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination, in the form Optuna stores; the last setting varies fastest.

        `UserError` if a range is continuous or there are more than MAX_GRID_SIZE combinations.
        """
        lists = [domain.texts if isinstance(domain, Categorical) else domain.grid_values() for domain in self.domains]
        if math.prod(len(values) for values in lists) > MAX_GRID_SIZE:
            raise UserError(f"the grid has more than {MAX_GRID_SIZE:,} combinations; list fewer values")
        return [dict(zip(self.texts, combination, strict=True)) for combination in itertools.product(*lists)]


def parse_search_space(tables: Mapping[str, Any], where: str, overrides: Mapping[str, str]) -> SearchSpace:
    """Split `overrides` (dotted setting: text) into fixed settings, merged over `tables`, and searched ones.

    `where` names the file of `tables` in error messages. `UserError` names the setting that cannot be parsed.
    """
    fixed: dict[str, Any] = {}
    searched: dict[str, str] = {}
    for name, text in overrides.items():
        hint = setting_type(name)
        if parse_domain(name, text, hint) is not None:
            searched[name] = text
        else:
            fixed[name] = parse_value(name, text, hint)
    return SearchSpace(merge_overrides(tables, fixed, where), searched, where)


def parse_domain(name: str, text: str, hint: Any) -> Domain | None:
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


def parse_choices(name: str, text: str, hint: Any) -> Categorical:
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
    return Categorical(name, texts, values)


def parse_range(name: str, text: str, hint: Any) -> Range:
    """Parse LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP; `high` becomes the last value that the steps reach."""
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
        raise UserError(f"--{name} {text!r}: the range is empty; write {high}:{low}")
    if low == high:
        raise UserError(f"--{name} {text!r}: the range is a single value; fix it with --{name} {low}")
    if log and low <= 0:
        raise UserError(f"--{name} {text!r}: a range on a logarithmic scale must start above 0")
    if not math.isfinite(high - low) or (step and (high - low) / step > MAX_RANGE_STEPS):
        raise UserError(f"--{name} {text!r}: the range is too wide")
    value_domain = Range(name, low, high, step, log)
    if step is None:
        return value_domain
    if step <= 0 or value_domain.n_steps() < 1:
        raise UserError(f"--{name} {text!r}: the step must be above 0 and at most {high - low:g}, or log")
    return dataclasses.replace(value_domain, high=value_domain.value_at_step(value_domain.n_steps()))


def parse_value(name: str, text: str, hint: Any) -> Any:
    """Parse a text to a value of type `hint`. `UserError` names the setting."""
    return validate(parse_text(text, hint, name), hint, COMMAND_LINE, name)
