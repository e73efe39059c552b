"""Several processes train the model that one does, stop together, and go on in any number. Over gloo, for real."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read_records
from safetensors.torch import load_file

from tinystories import checkpoint
from tinystories.cli.train.train import ensure_prepared
from tinystories.config_file import load_config
from tinystories.errors import UserError
from tinystories.train import state
from tinystories.train.distributed import World

pytestmark = pytest.mark.extended

STEPS = 20
SETTINGS = (
    "--model.n_layer 2 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 32 --optim.kind muon"
    f" --train.device cpu --train.steps {STEPS} --train.batch_size 8 --train.micro_batch 2 --train.log_every 1"
    " --train.precision fp32"
    " --train.checkpoint_every 5 --train.eval_every 10 --train.sample_tokens 4 --train.eval_stories 5"
).split()

# The command line, with something done before the given step of the given rank (-1: of all).
PROGRAM = """
import os, signal, sys, time
from tinystories.cli import main
from tinystories.train.loop import Trainer
plain = Trainer.train_step
def train_step(self, step):
    if {rank} in (-1, self.world.rank) and {when}:
        {what}
    return plain(self, step)
Trainer.train_step = train_step
main()
"""


def command(ranks: int, tmp_path: Path, run: Path, data: Path, *more: str, **event: Any) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(**({"rank": -1, "when": "False", "what": "pass"} | event)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(program), "train", "--data", str(data), "--out", str(run), *SETTINGS, *more]


def launch(*arguments: Any, **event: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments, **event), capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def numbers(run: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all that a run measured, but for times."""
    found = []
    for record in read_records(run):
        names = ("loss", "grad_norm", "learning_rate", "tokens", "val_bits_per_byte", "val_stories")
        found += [(record["step"], name, record[name]) for name in names if name in record]
    return found


def require_same(run: Path, other: Path) -> None:
    ours, theirs = numbers(run), numbers(other)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    assert [entry[2] for entry in ours] == pytest.approx([entry[2] for entry in theirs], abs=1e-5)
    ending = f"checkpoints/step-{STEPS:07d}/state/optimizer.safetensors"
    for name in ("model.safetensors", ending):
        a, b = load_file(run / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A straight run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(1, folder, folder / "run", sample_data)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_ranks_train_the_model_of_one(alone: Path, sample_data: Path, tmp_path: Path) -> None:
    done = launch(2, tmp_path, tmp_path / "run", sample_data)
    assert done.returncode == 0, done.stderr
    require_same(tmp_path / "run", alone)
    assert done.stderr.count(f"step {STEPS}/{STEPS}") == 1, "one rank talks"
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2,), (1,)),
        pytest.param((1,), (2, "--train.shard_optimizer", "true"), marks=pytest.mark.slow),
        ((2, "--train.shard_optimizer", "true"), (1,)),
    ],
    ids=["2 to 1", "1 to 2 sharded", "2 sharded to 1"],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    alone: Path, sample_data: Path, tmp_path: Path, before: Any, after: Any
) -> None:
    """Stopped by a signal that the last rank alone is sent; one that comes in step 12 ends with its checkpoint."""
    run = tmp_path / "run"
    event = {"rank": before[0] - 1, "when": "step == 11", "what": "os.kill(os.getpid(), signal.SIGTERM)"}
    stopped = launch(before[0], tmp_path, run, sample_data, *before[1:], **event)
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped by SIGTERM at step 12; saved") == 1, stopped.stderr
    assert checkpoint.read_model(run).provenance["step"] == 12
    done = launch(after[0], tmp_path, run, sample_data, "--resume", *after[1:])
    assert done.returncode == 0, done.stderr
    require_same(run, alone)


def test_ctrl_c_at_the_launcher_saves(alone: Path, sample_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The launcher is the parent of its ranks, each of which waits in step 7 until it is told to stop.
    what = """self.world.rank or os.kill(os.getppid(), signal.SIGINT)
        while not self.received_signal: time.sleep(0.01)"""
    stopped = launch(2, tmp_path, run, sample_data, when="step == 7", what=what)
    assert stopped.stderr.count(f"tinystories train --out {run} --resume") == 1, stopped.stderr
    assert launch(1, tmp_path, run, sample_data, "--resume").returncode == 0
    require_same(run, alone)


def test_a_rank_that_dies_ends_the_run_and_says_where_to_go_on(sample_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = launch(2, tmp_path, run, sample_data, rank=1, when="step == 12", what="os._exit(7)")
    assert ended.returncode != 0
    assert ended.stderr.count("another process of this run has ended") == 1, ended.stderr
    assert "step-0000010 with --resume" in ended.stderr
    assert "exitcode  : 7" in ended.stderr, "torchrun names the rank that died"
    last = state.find_latest_checkpoint(run)
    assert last is not None
    assert last.name == "step-0000010"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--train.batch_size", "9", "--train.micro_batch", "3"), "train.batch_size=9 is not divisible"),
        (("--model.n_head", "3"), "model.n_embd=16 must be a multiple of model.n_head=3"),
        (("--data", "nowhere"), "nowhere holds no prepared data"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(
    sample_data: Path, tmp_path: Path, more: tuple[str, ...], told: str
) -> None:
    ended = launch(2, tmp_path, tmp_path / "run", sample_data, *more)
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert told in ended.stderr
    assert not (tmp_path / "run").exists()


def place(monkeypatch: pytest.MonkeyPatch, *values: object) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), values, strict=False):
        monkeypatch.setenv(name, str(value))


def test_a_place_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.from_environment() == World(0, 1, 0, 1)
    place(monkeypatch, 3, 4, 1, 2)
    assert World.from_environment() == World(rank=3, size=4, local_rank=1, local_size=2)
    assert not World.from_environment().is_main


@pytest.mark.parametrize("values", [(4, 4, 0, 2), (0, 2), (0, 2, 0, 3), ("x", 2, 0, 2), (-1, 2, 0, 2), (0, 2, 2, 2)])
def test_an_impossible_place_is_refused(monkeypatch: pytest.MonkeyPatch, values: tuple[object, ...]) -> None:
    place(monkeypatch, *values)
    with pytest.raises(UserError, match="torchrun"):
        World.from_environment()


def test_several_processes_do_not_prepare_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place(monkeypatch, 1, 2, 1, 2)
    config = load_config("nano", {"data.dir": str(tmp_path / "new")})
    with pytest.raises(UserError, match="prepare it once: tinystories prepare tinystories --tokenizer"):
        ensure_prepared(config)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(1, 2, 1, 2).resolve_device("auto") == "cuda:1"
    assert World(1, 2, 1, 2).resolve_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--nproc-per-node 2"):
        World(3, 4, 3, 4).resolve_device("cuda")
