"""One process started by a launcher of several trains like one that was started by hand."""

from pathlib import Path

import pytest

from tinystories.config import Config
from tinystories.errors import UserError
from tinystories.train.distributed import World, claim_error_message
from tinystories.train.run import train

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"},
        {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
        {"RANK": "", "LOCAL_RANK": "zero"},
    ],
    ids=["alone", "complete", "no local rank", "of a job array", "not numbers"],
)
def test_a_world_of_one(
    variables: dict[str, str], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World()
    assert claim_error_message("an error")
    assert train(config, tmp_path / "run") is not None


@pytest.mark.parametrize("size", ["2", "0", "", "many"])
def test_anything_else_must_be_complete(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="inconsistent torchrun variables"):
        World.from_environment()
