"""A sweep whose database SQLite can read, but whose records are damaged, is one line, whatever Optuna raises."""

import sqlite3
from pathlib import Path

import optuna
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tinystories.cli import main
from tinystories.errors import UserError
from tinystories.sweep.search_space import parse_search_space
from tinystories.sweep.study import DATABASE, Plan, open_study, read_plan

OUTCOME = {"state": "complete", "bits_per_byte": 1.0, "step": 2, "tokens": 100, "seconds": 1.0}


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    folder.mkdir()
    space = parse_search_space({}, "test", {"optim.learning_rate": "1e-3:1e-2:log", "model.n_layer": "1:3"})
    study = open_study(folder)
    study.set_user_attr("plan", Plan(space).to_json())
    study.add_trial(
        optuna.trial.create_trial(
            params={"optim.learning_rate": 2e-3, "model.n_layer": 2},
            distributions=space.distributions,
            value=1.0,
            user_attrs={"outcome": OUTCOME},
        )
    )
    (folder / "trial-0000").mkdir()
    (folder / "trial-0000" / "config.toml").write_text("")
    return folder


def show(folder: Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--out", str(folder), "--show"])
    return int(stop.value.code or 0)


def test_a_whole_sweep_is_shown(sweep_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(sweep_dir) == 0
    assert "0.002" in capsys.readouterr().out


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trials SET state = 'x'",
        "UPDATE trials SET datetime_start = 'null'",
        "UPDATE trials SET datetime_start = 4611686018427387904",
        "UPDATE trial_values SET value_type = 'null'",
        "UPDATE study_directions SET direction = -1",
        "UPDATE study_user_attributes SET value_json = 1.5",
        "UPDATE study_user_attributes SET value_json = '\"a\"'",
        "UPDATE study_user_attributes SET value_json = '\"{}\"'",
        "UPDATE trial_user_attributes SET value_json = '[1]'",
        """UPDATE trial_user_attributes SET value_json = '{"state": "lost"}'""",
        "DELETE FROM studies",
        "DELETE FROM trial_params",
        "UPDATE trial_params SET param_value = NULL",
        "UPDATE trial_params SET param_value = 'x'",
        "UPDATE trial_params SET param_value = -1",
        "UPDATE trial_params SET distribution_json = '{}'",
    ],
)
def test_damaged_records(sweep_dir: Path, statement: str, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(sweep_dir / DATABASE) as connection:
        connection.execute(statement)
    connection.close()
    assert show(sweep_dir) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{DATABASE} has damaged records" in message or f"{DATABASE} cannot be used" in message


@pytest.mark.parametrize("table", ["trials", "trial_values", "trial_params", "studies"])
def test_a_damaged_page(sweep_dir: Path, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SQLite finds it only when the table is read."""
    with sqlite3.connect(sweep_dir / DATABASE) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (sweep_dir / DATABASE).open("r+b") as file:
        file.seek((page - 1) * page_size)
        file.write(b"\xff" * page_size)
    assert show(sweep_dir) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert DATABASE in message


def test_a_waiting_trial_is_not_damage(sweep_dir: Path) -> None:
    """A trial that has not been asked yet has no settings."""
    study = open_study(sweep_dir)
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING))
    assert show(sweep_dir) == 0


@pytest.mark.parametrize("pages", [1, 4, 8, 16, 24])
def test_a_database_is_created_whole_or_not_at_all(pages: int, tmp_path: Path) -> None:
    """A disk that was full while Optuna created its tables left some of them, which it could not use again."""

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(Engine, "connect", limit)
    try:
        with pytest.raises(UserError, match="disk is full"):
            open_study(tmp_path)
    finally:
        event.remove(Engine, "connect", limit)
    assert list(tmp_path.iterdir()) == []
    assert open_study(tmp_path).trials == []


def test_what_a_kill_leaves_of_a_database_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / f"{DATABASE}.new").write_bytes(b"part of a database")
    assert read_plan(tmp_path) is None
    assert open_study(tmp_path).trials == []
    assert [path.name for path in tmp_path.iterdir()] == [DATABASE]
