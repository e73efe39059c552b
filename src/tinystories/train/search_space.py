"""What a sweep searches: dotted settings whose text names several values, read by the types of `config.py`."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, get_args, get_origin

from tinystories.config import UNION_TYPES, Config, build_dataclass, merge_overrides, parse_text, setting_type, validate
from tinystories.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

CHOICES_PREFIX = "choose:"
COMMAND_LINE = "command line"
MAX_CANDIDATES = 200  # combinations looked at before a sweep is refused because none makes a config
MAX_GRID_SIZE = 100_000
MAX_RANGE_STEPS = 1e9


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One of a list. Optuna knows them by their texts, so that any type of setting can be chosen."""

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
    """Numbers from low to high, both included: ints where both are, every `step`-th where there is one."""

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
        """The value after n steps, without the rounding of n additions."""
        return type(self.low)(Decimal(str(self.low)) + n * Decimal(str(self.step or 1)))

    def n_steps(self) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step or 1)))

    def grid_values(self) -> Sequence[int | float]:
        """All values; `UserError` where they are too many to be tried one by one."""
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
    """`base` holds the tables of settings that all trials share, `texts` what was written for the searched ones.

    `where` is the file the tables come from, for messages.
    """

    base: Mapping[str, Any]
    texts: Mapping[str, str]
    where: str

    @property
    def domains(self) -> list[Domain]:
        parsed_domains = [parse_domain(name, text, setting_type(name)) for name, text in self.texts.items()]
        assert all(parsed_domains)
        return [domain for domain in parsed_domains if domain is not None]

    def build_config(self, values: Mapping[str, Any]) -> Config:
        """The config of a trial; `UserError` where its settings do not go together."""
        return build_dataclass(Config, merge_overrides(self.base, values, self.where), self.where)

    def find_valid_config(self) -> Config:
        """A config of the space. `UserError` where none can be found: then what is fixed must be wrong."""
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
        raise UserError(f"no combination of these settings makes a config: {first_error}")

    def iter_candidates(self) -> Iterator[dict[str, Any]]:
        """The corners of the space first, then some of its inside."""
        domains = self.domains
        corners = itertools.product(*(domain.bounds() for domain in domains))
        generator = random.Random(0)
        interior = ([domain.sample(generator) for domain in domains] for _ in range(MAX_CANDIDATES))
        for combination in itertools.chain(itertools.islice(corners, MAX_CANDIDATES), interior):
            yield dict(zip(self.texts, combination, strict=True))

    def data_dirs(self, config: Config) -> list[str]:
        """The prepared data that the trials read; `config` is one of the space."""
        data_domains = [domain for domain in self.domains if domain.name == "data.dir"]
        return [str(folder) for domain in data_domains for folder in domain.grid_values()] or [config.data.dir]

    def grid(self) -> list[dict[str, Any]]:
        """Every combination as Optuna stores it, the last setting changing fastest."""
        lists = [domain.texts if isinstance(domain, Categorical) else domain.grid_values() for domain in self.domains]
        if math.prod(len(values) for values in lists) > MAX_GRID_SIZE:
            raise UserError(f"the grid has more than {MAX_GRID_SIZE:,} combinations; list fewer values")
        return [dict(zip(self.texts, combination, strict=True)) for combination in itertools.product(*lists)]


def parse_search_space(tables: Mapping[str, Any], where: str, overrides: Mapping[str, str]) -> SearchSpace:
    """`{"section.key": text}` taken apart into what is fixed, laid over `tables`, and what is searched."""
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
    """The values that a setting's text names; None where it is a single one.

    Free text may hold commas and colons itself: there only a list after `choose:` is searched.
    """
    if text.startswith(CHOICES_PREFIX):
        return parse_choices(name, text.removeprefix(CHOICES_PREFIX), hint)
    if hint is str or get_origin(hint) is tuple:
        return None
    if ":" in text:
        return parse_range(name, text, hint)
    return parse_choices(name, text, hint) if "," in text else None


def parse_choices(name: str, text: str, hint: Any) -> Categorical:
    texts = tuple(part.strip() for part in text.split(","))
    if "" in texts:
        raise UserError(f"--{name} {text!r}: there is nothing between two commas, or at an end")
    values = tuple(parse_value(name, part, hint) for part in texts)
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"--{name} {text!r}: {texts[i]} stands there twice")
    if len(values) == 1:
        raise UserError(f"--{name} {text!r} is one value; list several, or fix it by --{name} {texts[0]}")
    return Categorical(name, texts, values)


def parse_range(name: str, text: str, hint: Any) -> Range:
    number_type = get_args(hint)[0] if get_origin(hint) in UNION_TYPES else hint
    if number_type not in (int, float):
        raise UserError(f"--{name} {text!r}: only numbers have ranges; list the values, as in --{name} A,B")
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3):
        raise UserError(f"--{name} {text!r}: a range is LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP")
    low, high = (parse_value(name, part, number_type) for part in parts[:2])
    log = parts[2:] == ["log"]
    step = parse_value(name, parts[2], number_type) if len(parts) == 3 and not log else None
    if low > high:
        raise UserError(f"--{name} {text!r}: the range is empty; write {high}:{low}")
    if low == high:
        raise UserError(f"--{name} {text!r}: the range is one value; fix it by --{name} {low}")
    if log and low <= 0:
        raise UserError(f"--{name} {text!r}: a range on a logarithmic scale must begin above 0")
    if not math.isfinite(high - low) or (step and (high - low) / step > MAX_RANGE_STEPS):
        raise UserError(f"--{name} {text!r}: the range is too wide")
    value_domain = Range(name, low, high, step, log)
    if step is None:
        return value_domain
    if step <= 0 or value_domain.n_steps() < 1:
        raise UserError(f"--{name} {text!r}: the step must be above 0 and at most {high - low:g}, or log")
    return dataclasses.replace(
        value_domain, high=value_domain.value_at_step(value_domain.n_steps())
    )  # the last value that is reached


def parse_value(name: str, text: str, hint: Any) -> Any:
    """A text as a value of the setting's type."""
    return validate(parse_text(text, hint, name), hint, COMMAND_LINE, name)
