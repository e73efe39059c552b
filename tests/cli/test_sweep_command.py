"""`tinystories sweep` as a user types it: real trials, an interrupt, a resume, and errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config_file import load_config

pytestmark = pytest.mark.extended

TINY = (
    "--model.n_layer 1 --model.n_embd 16 --model.n_ff 32 --model.n_head 2 --model.n_ctx 32 --train.device cpu"
    " --train.precision fp32"
    " --train.batch_size 4 --train.micro_batch 4 --train.log_every 1 --train.sample_tokens 1 --train.eval_every 999"
    " --train.eval_stories 2 --train.steps 1000000"
)
RATES = ["--optim.learning_rate", "1e-2,1e-3"]


def sweep(*words: str) -> list[str]:
    return [sys.executable, "-m", "tinystories", "sweep", *words]


def test_a_sweep_stopped_by_ctrl_c_resumes_its_trials(sample_data: Path, tmp_path: Path) -> None:
    """One trial is invalid, so that there is one to train."""
    out = tmp_path / "sweep"
    words = [
        "--data",
        str(sample_data),
        "--out",
        str(out),
        *TINY.split(),
        "--model.n_head",
        "3,2",
        "--optim.kind",
        "adamw,muon",
    ]
    command = sweep(*words, "--sampler", "grid", "--trials", "3")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    metrics = out / "trial-0002" / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the trials have not been kept out of
    _, told = process.communicate()
    assert process.returncode == 130
    assert f"2 of 3 trials finished; saved. Resume with: tinystories sweep --out {out} --resume" in told
    assert told.count("must be a multiple of model.n_head=3") == 2
    assert "Traceback" not in told
    saved = sorted((out / "trial-0002" / "checkpoints").iterdir())
    assert saved, "the trial has saved"
    step = int(saved[-1].name.removeprefix("step-"))
    config = out / "trial-0002" / "config.toml"  # the rest need not be long
    config.write_text(config.read_text().replace("steps = 1000000", f"steps = {step + 2}"))
    done = subprocess.run(sweep("--out", str(out), "--resume", "--json"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert f"tinystories train --config {out}/best.toml" in done.stderr
    assert facts["best"]["settings"] == {"model.n_head": 2, "optim.kind": "adamw"}
    assert [trial["state"] for trial in facts["trials"]] == ["complete", "invalid", "invalid"]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert records[-1]["final"]
    assert records[-1]["val_bits_per_byte"] == facts["best"]["bits_per_byte"] > 0
    trained = [record["step"] for record in records if "loss" in record]
    assert trained == list(range(1, step + 3))
    assert load_config(out / "best.toml") == load_config(config)
    assert load_config(out / "best.toml").optim.kind == "adamw"
    assert (out / "sweep.png").exists()
    assert "Warning" not in told + done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.stpes 3 --optim.kind muon,adamw", "unknown setting train.stpes; did you mean train.steps?"),
        ("--train.steps 3", "nothing to search"),
        ("--optim.learning_rate 1e-1:1e-3:log", "empty; write 0.001:0.1"),
        ("--optim.learning_rate 1e-3,1e-2 --train.steps -3", "train.steps=-3 must be positive"),
        ("--optim.learning_rate 1e-3,1e-2 --config nan0", "did you mean the preset nano?"),
        ("--optim.learning_rate 1e-3:1e-2 --sampler grid", "a grid needs a list"),
        ("--optim.learning_rate 1e-3,1e-2 --data nowhere", "nowhere holds no prepared data"),
        ("--optim.learning_rate", "needs a value"),
        ("--trials 0 --optim.learning_rate 1e-3,1e-2", "--trials"),
        ("--show", "--show found no sweep in --out new"),
        ("learning_rate", "unexpected argument learning_rate"),
    ],
)
def test_every_mistake_gets_one_line_and_leaves_nothing(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["sweep", "--out", "new", *words.split()]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without MASTER_ADDR nobody keeps a list of what was said, so it is told."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run(cli, ["sweep", "--out", str(tmp_path / "new"), *RATES]) == 2
    assert "without torchrun, with --workers N" in capsys.readouterr().err


def test_a_sweep_of_invalid_trials_can_be_shown_and_is_not_begun_twice(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained: the first two combinations of the grid do not go together."""
    out = str(tmp_path / "sweep")
    words = ["sweep", "--data", str(sample_data), "--out", out, "--sampler", "grid", "--trials", "2"]
    words += ["--model.n_head", "7,2", "--model.n_embd", "16,32"]
    assert run(cli, words) == 0
    told = capsys.readouterr()
    assert "no trial is complete yet" in told.out
    assert run(cli, ["sweep", "--out", out, "--show", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["best"] is None
    assert [trial["state"] for trial in facts["trials"]] == ["invalid", "invalid"]
    assert run(cli, words) == 2
    assert "already holds a sweep; add --resume" in capsys.readouterr().err
    assert run(cli, [*words, "--resume"]) == 0
    assert "trial 1 invalid" in capsys.readouterr().out
    assert run(cli, [*words, "--resume", "--train.steps", "7"]) == 2
    assert "was started with train.steps" in capsys.readouterr().err


def test_help_shows_every_kind_of_search_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["sweep", "--help"]) == 0
    told = capsys.readouterr().out
    for words in ("--optim.learning_rate 1e-4:1e-2:log", "--resume --trials 40", "best.toml", "--workers"):
        assert words in told
