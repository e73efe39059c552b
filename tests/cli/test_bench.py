"""`tinystories bench`: who takes part, that all write the same ids from the same weights, and what is refused."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinystories.bench.runner import Measurement, Task, run_rounds, speed_ratios
from tinystories.bench.setup import REQUIRED_PACKAGES, Competitor, prepare_competitors, write_random_weights
from tinystories.checkpoint import BUNDLED_MODEL, read_model
from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config import ModelConfig

pytestmark = pytest.mark.extended

SMALL = ["--preset", "nano", "--vocab", "64", "--runs", "1", "--threads", "1"]
PEERS = ["torch:fp32", "transformers:fp32", "ctranslate2:fp32", "llama.cpp:fp32"]


def measure(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Return the JSON object of a benchmark, which must be all of stdout."""
    assert run(cli, ["bench", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def skip_unless_installed(peer: str) -> None:
    for package in REQUIRED_PACKAGES[peer.split(":")[0]]:
        pytest.importorskip(package)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("command", ["decode", pytest.param("batch", marks=pytest.mark.slow)])
def test_every_peer_writes_the_ids_of_tinystories(command: str, peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip_unless_installed(peer)
    task = ["--tokens", "6", *(["--prompt-tokens", "9"] if command == "decode" else ["--streams", "3"])]
    found = measure(capsys, command, *SMALL, *task, "--only", f"tinystories:fp32,{peer}")
    name = peer.replace(":", " ")
    scores = found[command]
    assert set(scores["tokens_per_s"]) == {"tinystories fp32", name}
    assert min(scores["tokens_per_s"].values()) > 0
    assert scores["same_ids"][name] == 1
    if not peer.startswith("torch"):
        assert scores["ratios"][f"tinystories fp32 / {name}"] > 0


def test_a_shortlist_is_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--tokens", "6", "--prompt-tokens", "9", "--shortlist", "9", "--only", "tinystories:int4,tinystories:int8"]
    found = measure(capsys, "decode", *SMALL, *task)
    rows = ["tinystories int4", "tinystories int4, 9 ids", "tinystories int8", "tinystories int8, 9 ids"]
    assert list(found["decode"]["tokens_per_s"]) == rows
    same = found["decode"]["same_ids"]
    assert same[rows[1]] < same[rows[0]] == 1
    assert list(found["decode"]["ratios"]) == [f"{rows[1]} / {rows[0]}", f"{rows[3]} / {rows[2]}"]


def test_a_shortlist_is_compared_with_peers(capsys: pytest.CaptureFixture[str]) -> None:
    skip_unless_installed("llama.cpp")
    task = ["--tokens", "2", "--prompt-tokens", "2", "--shortlist", "9", "--only", "tinystories:fp32,llama.cpp:fp32"]
    found = measure(capsys, "decode", *SMALL, *task)
    names = ["tinystories fp32 / llama.cpp fp32", "tinystories fp32, 9 ids / llama.cpp fp32"]
    assert list(found["decode"]["ratios"])[:2] == names


def test_int8_with_activations_of_8_bits_is_compared_with_int8_of_peers() -> None:
    def measured(name: str, precision: str, rate: float) -> Measurement:
        process: Any = SimpleNamespace(competitor=Competitor(name, precision))
        return Measurement(process, [rate])

    ours = [measured("tinystories", precision, rate) for precision, rate in (("int8", 3), ("int8-a8", 4), ("int4", 2))]
    assert speed_ratios([*ours, measured("ctranslate2", "int8", 2), measured("llama.cpp", "int4", 1)]) == {
        "tinystories int8 / ctranslate2 int8": 1.5,
        "tinystories int8-a8 / ctranslate2 int8": 2,
        "tinystories int4 / llama.cpp int4": 2,
        "fastest: tinystories int8-a8 / ctranslate2 int8": 2,
    }


def test_the_classic_architecture_runs_beside_ctranslate2(capsys: pytest.CaptureFixture[str]) -> None:
    skip_unless_installed("ctranslate2")
    shape = [*SMALL, "--preset", "seed-89m", "--tokens", "3", "--prompt-tokens", "4"]
    found = measure(capsys, "decode", *shape, "--only", "tinystories:fp32,ctranslate2:fp32")
    assert found["decode"]["same_ids"]["ctranslate2 fp32"] == 1


def test_a_program_that_is_not_installed_is_skipped_and_named(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    gone = {"transformers", "ctranslate2", "llama_cpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    with caplog.at_level(logging.INFO):
        found = measure(capsys, "decode", *SMALL, "--tokens", "2", "--prompt-tokens", "2", "--peers")
    assert set(found["versions"]) == {"tinystories", "torch"}
    for name in ("transformers", "ctranslate2", "llama.cpp"):
        assert f"skipping {name}: it needs" in caplog.text


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled storyteller, which has only int8 weights, in a folder that can be written to."""
    return shutil.copytree(BUNDLED_MODEL, tmp_path_factory.mktemp("models") / "int8")


@pytest.mark.parametrize("command", ["decode", "batch"])
def test_a_model_of_only_int8_weights_runs_dequantized_in_every_program(
    command: str, int8_model: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    task = [command, str(int8_model), *(["--streams", "2"] if command == "batch" else ["--prompt-tokens", "9"])]
    programs = "tinystories,torch" + (",transformers" if importlib.util.find_spec("transformers") else "")
    with caplog.at_level(logging.INFO):
        found = measure(capsys, *task, "--runs", "1", "--threads", "1", "--tokens", "4", "--only", programs)
    same = found[command]["same_ids"]
    ours = {f"tinystories {precision}" for precision in ("fp32", "int8", "int8-a8", "int4")}
    assert ours | {"torch fp32"} <= same.keys()
    assert all(share == 1 for label, share in same.items() if label.endswith("fp32"))
    assert "has only int8 weights: every program starts from them dequantized to fp32" in caplog.text
    assert found["parameters"] == read_model(int8_model).config.n_params


def test_startup_of_a_model_of_only_int8_weights_is_measured(
    int8_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "tinystories:int8" + (",ctranslate2:int8" if importlib.util.find_spec("ctranslate2") else "")
    found = measure(capsys, "startup", str(int8_model), "--runs", "1", "--threads", "1", "--only", only)
    assert list(found["seconds"]) == only.replace(":", " ").split(",")
    assert min(found["seconds"].values()) > 0


def test_random_weights_of_sizes_that_are_no_multiple_of_16_are_read_by_every_program(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=61, n_ctx=16, n_layer=1, n_head=2, n_embd=20, n_ff=28)
    write_random_weights(tmp_path, config)
    only = [Competitor("tinystories", "int8"), Competitor("torch", "fp32")]
    assert prepare_competitors(tmp_path, config, only, peers=False) == only


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["decode", *SMALL, "--only", "vllm"], "--only vllm: unknown program"),
        (["decode", *SMALL, "--only", "torch:int4"], "--only torch:int4: unknown program or precision"),
        (["decode", *SMALL, "--tokens", "5000"], "5008 tokens exceed the model's context"),
        (["decode", *SMALL, "--shortlist", "64"], "--shortlist 64 must be below the vocabulary size"),
        (["decode", *SMALL, "--shortlist", "9", "--only", "torch"], "--only leaves out"),
        (["decode", "somewhere", "--preset", "nano"], "either MODEL or --preset"),
        (["decode", "nowhere"], "no such model directory"),
        (["startup"], "requires MODEL"),
        (["batch", *SMALL, "--preset", "seed-89m", "--only", "llama.cpp"], "llama.cpp"),
    ],
)
def test_a_benchmark_that_cannot_run_is_refused(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["bench", *words]) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_program_that_ends_is_an_error_with_its_last_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert run(cli, ["bench", "decode", *SMALL, "--tokens", "2", "--prompt-tokens", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: tinystories fp32 stopped: out of luck"


@pytest.mark.parametrize(("by_cpu_seconds", "rate"), [(False, 3.0), (True, 6.0)])
def test_rates_are_tokens_per_second_or_per_second_of_processor_time(by_cpu_seconds: bool, rate: float) -> None:
    class Process:
        def generate(self, _prompts: Any, _tokens: int) -> dict[str, Any]:
            return {"seconds": 4.0, "cpu_seconds": 2.0, "ids": [[1]], "peak_mb": None}

    task = Task("decode", 1, 1, 12, 12)
    process: Any = Process()
    (found,) = run_rounds([process], task, [[0]], 2, by_cpu_seconds=by_cpu_seconds)
    assert found.rates == [rate, rate]


def test_processor_time_of_several_threads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(cli, ["bench", "decode", *SMALL[:-1], "2", "--tokens", "2", "--prompt-tokens", "2", "--cpu-seconds"]) == 2
    )
    assert "--threads 1" in capsys.readouterr().err
