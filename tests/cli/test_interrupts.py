"""A run that is stopped by a signal, or killed while it writes a checkpoint, ends with the bits of a straight run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PROGRAM, run_python

pytestmark = pytest.mark.extended

# The process kills itself when the checkpoint of step 8 has its weights and not yet its config.
KILLED_WHILE_WRITING = """
import os, signal
from tinystories import checkpoint
from tinystories.cli import main
plain = checkpoint.write_json
def write_json(path, value):
    if path.name == "config.json" and "step-0000008" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    plain(path, value)
checkpoint.write_json = write_json
main()
"""

# The process gets a signal during its seventh step.
SIGNALED = """
import os
from tinystories.cli import main
from tinystories.train.loop import Trainer
plain = Trainer.train_step
def train_step(trainer, step):
    if step == 6:
        os.kill(os.getpid(), {number})
    return plain(trainer, step)
Trainer.train_step = train_step
main()
"""


def command(data: Path, out: Path, *more: str) -> list[str]:
    settings = (
        "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 64 --model.dropout 0.1"
        " --train.device cpu --train.batch_size 4 --train.micro_batch 4 --train.steps 24 --train.log_every 1"
        " --train.precision fp32"
        " --train.checkpoint_every 4 --train.eval_every 12 --train.sample_tokens 4"
    )
    return ["train", "--data", str(data), "--out", str(out), *settings.split(), *more]


def finish(data: Path, out: Path, *more: str) -> bytes:
    subprocess.run([sys.executable, "-c", PROGRAM, *command(data, out, *more)], check=True, capture_output=True)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return finish(sample_data, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_gives_the_same_bits(
    straight: bytes, sample_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    stopped = run_python("-c", SIGNALED.format(number=int(number)), *command(sample_data, out))
    assert stopped.returncode == 128 + number
    assert f"tinystories train --out {out} --resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (out / "checkpoints" / "step-0000007").is_dir()
    assert finish(sample_data, out, "--resume") == straight


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_with_the_same_bits(
    straight: bytes, sample_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *command(sample_data, out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000008.draft"]
    assert (out / "checkpoints" / "step-0000008.draft" / "model.safetensors").exists()
    assert finish(sample_data, out, "--resume") == straight
    assert not list(out.rglob("*.draft"))


def test_resume_needs_no_config(straight: bytes, sample_data: Path, tmp_path: Path) -> None:
    """The settings are in the run directory: `train --out RUN --resume` is enough."""
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *command(sample_data, out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    words = ["train", "--out", str(out), "--resume"]
    subprocess.run([sys.executable, "-c", PROGRAM, *words], check=True, capture_output=True)
    assert (out / "model.safetensors").read_bytes() == straight
