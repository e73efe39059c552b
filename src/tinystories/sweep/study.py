"""A sweep on disk: its plan and its trials, stored by Optuna in SWEEP/sweep.db (SQLite)."""

import contextlib
import dataclasses
import json
import logging
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from tinystories.config import Config
from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.files import atomic_file, write_errors
from tinystories.sweep.search_space import SearchSpace

DATABASE = "sweep.db"
LOCK = ".lock"  # in the sweep's folder, while it runs
STUDY_NAME = "sweep"  # the only study in the database
DATABASE_TIMEOUT = 60.0  # seconds to wait while another process holds the SQLite lock


@dataclasses.dataclass(frozen=True)
class Plan:
    """The request behind a sweep, stored with it. When resuming, only the number of trials may change."""

    space: SearchSpace
    trials: int = 20  # total over all sessions
    sampler: str = "tpe"
    prune: str = "none"
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Plan":
        values = json.loads(text)
        return Plan(**values | {"space": SearchSpace(**values["space"])})

    def flatten(self) -> dict[str, Any]:
        """Return everything that determines the trials, by the name a user types."""
        fixed = {
            f"{section}.{key}": value for section, table in self.space.base.items() for key, value in table.items()
        }
        # Earlier versions stored paths as they were given.
        fixed |= {name: path for name, path in self.space.read_paths().items() if name in fixed}
        options = {"--sampler": self.sampler, "--prune": self.prune, "--seed": self.seed}
        return fixed | dict(self.space.texts) | options


def merge_plan(stored: Plan | None, space: SearchSpace | None, requested: Mapping[str, Any], folder: Path) -> Plan:
    """Return the plan to continue with: the stored one, updated by what the user requested.

    `UserError` if the request contradicts what the sweep in `folder` was started with.
    """
    space = space or (stored.space if stored else None)
    assert space is not None, "a new sweep needs settings"
    plan = dataclasses.replace(stored or Plan(space), space=space, **requested)
    plan = Plan.from_json(plan.to_json())
    stored_settings, new_settings = (stored or plan).flatten(), plan.flatten()
    for name in [*new_settings, *stored_settings]:
        stored_value, new_value = stored_settings.get(name, "unset"), new_settings.get(name, "unset")
        if stored_value != new_value:
            raise UserError(
                f"{folder} was started with {name} {stored_value}, not {new_value};"
                " resume without settings, or choose another --out"
            )
    if plan.sampler == "grid":
        size = len(space.grid())
        has_limit = stored is not None or "trials" in requested
        plan = dataclasses.replace(plan, trials=min(size, plan.trials) if has_limit else size)
    return plan


def read_plan(folder: Path) -> Plan | None:
    """Return the plan of the sweep in a folder; None if there is none yet. `UserError` if it holds something else."""
    with write_errors(f"--out {folder}"):
        if folder.is_file():
            raise UserError(f"--out {folder} is a file; choose a directory")
        if (folder / DATABASE).exists():
            with database_errors(folder), damaged_records(folder):
                text = open_study(folder).user_attrs.get("plan")  # a sweep may be killed before it stores its plan
                return Plan.from_json(text) if text else None
        if folder.exists() and any(path.name not in (LOCK, f"{DATABASE}.new") for path in folder.iterdir()):
            raise UserError(f"--out {folder} is not a sweep and not empty; choose another directory")
        return None


def open_study(folder: Path) -> optuna.Study:
    """Open the study of a sweep, creating it if needed. `UserError` if the database cannot be read."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with database_errors(folder), damaged_records(folder):
        if not (folder / DATABASE).exists():
            create_database(folder / DATABASE)
        return load_or_create_study(open_storage(folder / DATABASE))


def create_database(path: Path) -> None:
    """Create a database that holds an empty study, whole or not at all.

    Optuna creates its tables one by one, and cannot go on with some of them.
    """
    with tempfile.TemporaryDirectory() as temporary_folder:
        temporary_path = Path(temporary_folder) / DATABASE
        storage = open_storage(temporary_path)
        load_or_create_study(storage)
        storage.engine.dispose()
        content = temporary_path.read_bytes()
    with atomic_file(path) as file:
        file.write(content)


def open_storage(path: Path) -> optuna.storages.RDBStorage:
    from sqlalchemy.engine import URL

    url = URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": DATABASE_TIMEOUT}})


def load_or_create_study(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name=STUDY_NAME, direction="minimize", load_if_exists=True)


@contextlib.contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turn errors of a sweep's database inside the block into `UserError`: disk full, read-only, damaged, foreign."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "optuna" not in str(error).lower():
            raise  # Optuna raises it for a database of another of its versions
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        reason = sanitize(str(getattr(cause, "orig", None) or cause).splitlines()[0])
        raise UserError(f"{folder / DATABASE} cannot be used: {reason}") from None


@contextlib.contextmanager
def damaged_records(folder: Path) -> Iterator[None]:
    """Raise `UserError` for records inside the block that Optuna or we cannot read, in a database that SQLite can."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {sanitize(error)}"
        raise UserError(f"{folder / DATABASE} has damaged records ({reason}); restore a copy, or start again") from None


def read_trials(study: optuna.Study, space: SearchSpace, folder: Path) -> list[FrozenTrial]:
    """Return all trials. `UserError` if one is damaged: a finished trial has a value in range for each setting."""
    with database_errors(folder), damaged_records(folder):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            for name, distribution in space.distributions.items():
                if name not in trial.params and not trial.state.is_finished():
                    continue
                value = distribution.to_internal_repr(
                    trial.params[name]
                )  # ValueError unless it is a number or a choice
                if not distribution._contains(value):
                    raise ValueError(f"{name} is out of range")
    return trials


def make_sampler(plan: Plan, number: int) -> BaseSampler:
    """Return the sampler of trial `number`.

    Its seed depends only on the plan's seed and the trial's number, so a resumed sweep draws what an uninterrupted one
    would, without saved sampler state. With a grid the values are enqueued, and the sampler is not consulted.
    """
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    return TPESampler(seed=seed) if plan.sampler == "tpe" else RandomSampler(seed=seed)


def make_pruner(plan: Plan, config: Config) -> BasePruner:
    """Return the pruner that the plan names. `config` is any valid config of its search space."""
    if plan.prune == "hyperband":
        return HyperbandPruner(min_resource=config.train.eval_every, max_resource=config.train.steps)
    return MedianPruner() if plan.prune == "median" else NopPruner()
