"""What a sweep searches: dotted settings whose text names several values, read by the types of `config.py`."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, get_args, get_origin

from tinystories.config import UNIONS, Config, build, checked, overlaid, parse_text, setting_type
from tinystories.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

CHOOSE = "choose:"
FLAG = "command line"
TRIES = 200  # combinations looked at before a sweep is refused because none makes a config
LARGEST_GRID = 100_000
MOST_STEPS = 1e9


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of a list. Optuna knows them by their texts, so that any type of setting can be chosen."""

    name: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]
    log: bool = False

    def suggest(self, trial: "Trial") -> Any:
        return self.value(trial.suggest_categorical(self.name, self.texts))

    def value(self, stored: Any) -> Any:
        """The setting's value for what Optuna stores."""
        return self.values[self.texts.index(stored)]

    def listed(self) -> Sequence[Any]:
        return self.values

    def ends(self) -> Sequence[Any]:
        return self.values

    def drawn(self, generator: random.Random) -> Any:
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

    def value(self, stored: Any) -> Any:
        """The setting's value for what Optuna stores."""
        return stored

    def nth(self, n: int) -> int | float:
        """The value after n steps, without the rounding of n additions."""
        return type(self.low)(Decimal(str(self.low)) + n * Decimal(str(self.step or 1)))

    def n_steps(self) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step or 1)))

    def listed(self) -> Sequence[int | float]:
        """All values; `UserError` where they are too many to be tried one by one."""
        if self.log or (self.step is None and isinstance(self.low, float)):
            raise UserError(f"--{self.name} is a range without steps; a grid needs a list, or LOW:HIGH:STEP")
        if self.n_steps() >= LARGEST_GRID:
            raise UserError(f"--{self.name} has more than {LARGEST_GRID:,} values; a grid needs fewer")
        return [self.nth(n) for n in range(self.n_steps() + 1)]

    def ends(self) -> Sequence[int | float]:
        return self.low, self.high

    def drawn(self, generator: random.Random) -> int | float:
        if self.step is None and isinstance(self.low, float):
            return generator.uniform(self.low, self.high)
        return self.nth(generator.randint(0, self.n_steps()))


Domain = Choices | Range


@dataclasses.dataclass(frozen=True)
class Space:
    """`base` holds the tables of settings that all trials share, `texts` what was written for the searched ones.

    `where` is the file the tables come from, for messages.
    """

    base: Mapping[str, Any]
    texts: Mapping[str, str]
    where: str

    @property
    def domains(self) -> list[Domain]:
        found = [domain_of(name, text, setting_type(name)) for name, text in self.texts.items()]
        assert all(found)
        return [domain for domain in found if domain is not None]

    def config(self, values: Mapping[str, Any]) -> Config:
        """The config of a trial; `UserError` where its settings do not go together."""
        return build(Config, overlaid(self.base, values, self.where), self.where)

    def example(self) -> Config:
        """A config of the space. `UserError` where none can be found: then what is fixed must be wrong."""
        if not self.texts:
            raise UserError(
                "nothing to search: give a setting several values, as in --optim.learning_rate 1e-4:1e-2:log or"
                " --train.batch_size 8,16"
            )
        reason = None
        for values in self.samples():
            try:
                return self.config(values)
            except UserError as error:
                reason = reason or error
        assert reason is not None
        raise UserError(f"no combination of these settings makes a config: {reason}")

    def samples(self) -> Iterator[dict[str, Any]]:
        """The corners of the space first, then some of its inside."""
        domains = self.domains
        corners = itertools.product(*(domain.ends() for domain in domains))
        generator = random.Random(0)
        inside = ([domain.drawn(generator) for domain in domains] for _ in range(TRIES))
        for combination in itertools.chain(itertools.islice(corners, TRIES), inside):
            yield dict(zip(self.texts, combination, strict=True))

    def data_folders(self, config: Config) -> list[str]:
        """The prepared data that the trials read; `config` is one of the space."""
        searched = [domain for domain in self.domains if domain.name == "data.dir"]
        return [str(folder) for domain in searched for folder in domain.listed()] or [config.data.dir]

    def grid(self) -> list[dict[str, Any]]:
        """Every combination as Optuna stores it, the last setting changing fastest."""
        lists = [domain.texts if isinstance(domain, Choices) else domain.listed() for domain in self.domains]
        if math.prod(len(values) for values in lists) > LARGEST_GRID:
            raise UserError(f"the grid has more than {LARGEST_GRID:,} combinations; list fewer values")
        return [dict(zip(self.texts, combination, strict=True)) for combination in itertools.product(*lists)]


def read_space(tables: Mapping[str, Any], where: str, overrides: Mapping[str, str]) -> Space:
    """`{"section.key": text}` taken apart into what is fixed, laid over `tables`, and what is searched."""
    fixed: dict[str, Any] = {}
    searched: dict[str, str] = {}
    for name, text in overrides.items():
        hint = setting_type(name)
        if domain_of(name, text, hint) is not None:
            searched[name] = text
        else:
            fixed[name] = one_value(name, text, hint)
    return Space(overlaid(tables, fixed, where), searched, where)


def domain_of(name: str, text: str, hint: Any) -> Domain | None:
    """The values that a setting's text names; None where it is a single one.

    Free text may hold commas and colons itself: there only a list after `choose:` is searched.
    """
    if text.startswith(CHOOSE):
        return choices(name, text.removeprefix(CHOOSE), hint)
    if hint is str or get_origin(hint) is tuple:
        return None
    if ":" in text:
        return value_range(name, text, hint)
    return choices(name, text, hint) if "," in text else None


def choices(name: str, text: str, hint: Any) -> Choices:
    texts = tuple(part.strip() for part in text.split(","))
    if "" in texts:
        raise UserError(f"--{name} {text!r}: there is nothing between two commas, or at an end")
    values = tuple(one_value(name, part, hint) for part in texts)
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"--{name} {text!r}: {texts[i]} stands there twice")
    if len(values) == 1:
        raise UserError(f"--{name} {text!r} is one value; list several, or fix it by --{name} {texts[0]}")
    return Choices(name, texts, values)


def value_range(name: str, text: str, hint: Any) -> Range:
    number = get_args(hint)[0] if get_origin(hint) in UNIONS else hint
    if number not in (int, float):
        raise UserError(f"--{name} {text!r}: only numbers have ranges; list the values, as in --{name} A,B")
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (2, 3):
        raise UserError(f"--{name} {text!r}: a range is LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP")
    low, high = (one_value(name, part, number) for part in parts[:2])
    log = parts[2:] == ["log"]
    step = one_value(name, parts[2], number) if len(parts) == 3 and not log else None
    if low > high:
        raise UserError(f"--{name} {text!r}: the range is empty; write {high}:{low}")
    if low == high:
        raise UserError(f"--{name} {text!r}: the range is one value; fix it by --{name} {low}")
    if log and low <= 0:
        raise UserError(f"--{name} {text!r}: a range on a logarithmic scale must begin above 0")
    if not math.isfinite(high - low) or (step and (high - low) / step > MOST_STEPS):
        raise UserError(f"--{name} {text!r}: the range is too wide")
    found = Range(name, low, high, step, log)
    if step is None:
        return found
    if step <= 0 or found.n_steps() < 1:
        raise UserError(f"--{name} {text!r}: the step must be above 0 and at most {high - low:g}, or log")
    return dataclasses.replace(found, high=found.nth(found.n_steps()))  # the last value that is reached


def one_value(name: str, text: str, hint: Any) -> Any:
    """A text as a value of the setting's type."""
    return checked(parse_text(text, hint, name), hint, FLAG, name)
