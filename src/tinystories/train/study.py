"""A sweep on disk: what was asked for and its trials, in Optuna's tables in SWEEP/sweep.db."""

import contextlib
import dataclasses
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinystories.config import Config
from tinystories.errors import UserError
from tinystories.train.search_space import SearchSpace

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

DATABASE = "sweep.db"
STUDY_NAME = "sweep"  # of the only study in the file
DATABASE_TIMEOUT = 60.0  # seconds to wait for another reader or writer of the file


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep is asked for, stored with it. On resuming, only the number of trials may change."""

    space: SearchSpace
    trials: int = 20  # in all
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
        """Everything that decides which trials come, by the name a user knows it by."""
        fixed = {
            f"{section}.{key}": value for section, table in self.space.base.items() for key, value in table.items()
        }
        options = {"--sampler": self.sampler, "--prune": self.prune, "--seed": self.seed}
        return fixed | dict(self.space.texts) | options


def merge_plan(stored: Plan | None, space: SearchSpace | None, requested: Mapping[str, Any], folder: Path) -> Plan:
    """The plan of this sitting. What is asked for must not contradict what the sweep in `folder` was begun with."""
    if stored is None:
        assert space is not None, "a new sweep needs settings"
        plan = Plan(space, **requested)
        if plan.sampler == "grid":
            size = len(space.grid())
            plan = dataclasses.replace(plan, trials=min(size, requested.get("trials", size)))
        return Plan.from_json(plan.to_json())
    plan = dataclasses.replace(stored, space=space or stored.space, **requested)
    plan = Plan.from_json(plan.to_json())
    stored_settings, new_settings = stored.flatten(), plan.flatten()
    for name in [*new_settings, *stored_settings]:
        if stored_settings.get(name) != new_settings.get(name):
            raise UserError(
                f"{folder} was begun with {name} {stored_settings.get(name, 'not given')}, not {new_settings.get(name, 'left out')};"
                " resume without settings, or name another --out"
            )
    if plan.sampler == "grid":
        plan = dataclasses.replace(plan, trials=min(plan.trials, len(plan.space.grid())))
    return plan


def read_plan(folder: Path) -> Plan | None:
    """The plan of the sweep in a folder; None where there is none yet. `UserError` where something else is."""
    if folder.is_file():
        raise UserError(f"--out {folder} is a file; name a directory")
    if (folder / DATABASE).exists():
        return load_plan(open_study(folder))
    if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"--out {folder} holds something else than a sweep; name another directory")
    return None


def load_plan(study: "Study") -> Plan | None:
    text = study.user_attrs.get("plan")
    return Plan.from_json(text) if text else None


def open_study(folder: Path) -> "Study":
    """The study of a sweep, made where it is not there yet."""
    import optuna
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    path = (folder / DATABASE).absolute()
    url = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": DATABASE_TIMEOUT}})
        return optuna.create_study(storage=storage, study_name=STUDY_NAME, direction="minimize", load_if_exists=True)
    except (DatabaseError, RuntimeError) as error:  # no database; or one of another version of Optuna
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}; name another --out") from None


def make_sampler(plan: Plan, number: int) -> "BaseSampler":
    """The sampler of one trial. Its seed is a function of the plan's and the trial's number, so resuming changes
    nothing and there is no state to save. A grid brings its values itself.
    """
    import numpy as np
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    return TPESampler(seed=seed) if plan.sampler == "tpe" else RandomSampler(seed=seed)


def make_pruner(plan: Plan, config: Config) -> "BasePruner":
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if plan.prune == "hyperband":
        return HyperbandPruner(min_resource=config.train.eval_every, max_resource=config.train.steps)
    return MedianPruner() if plan.prune == "median" else NopPruner()


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """While it lasts, no other sweep works in the folder. The lock goes with its process, whatever ends that."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(folder / ".lock", timeout=0, isolation_level=None)
    try:
        lock.execute("PRAGMA journal_mode = off")
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise UserError(
            f"{folder} is being swept already ({error}); look at it with --show, or stop the other one and --resume:"
            " one command runs several trials at once by --workers"
        ) from None
    try:
        yield
    finally:
        lock.close()
