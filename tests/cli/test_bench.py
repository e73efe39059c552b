"""`tinystories bench`: who takes part, that all write the same ids from the same weights, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tinystories.bench import competitors as bench_competitors
from tinystories.cli import main

pytestmark = pytest.mark.extended

SMALL = ["--preset", "nano", "--vocab", "64", "--runs", "1"]
PEERS = ["torch:fp32", "transformers:fp32", "ctranslate2:fp32", "llama.cpp:fp32"]


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str]:
    """The JSON line and all of stderr; the exit code in place of the JSON where it is not 0."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    out, err = capsys.readouterr()
    return (json.loads(out.splitlines()[-1]) if not ended.value.code else ended.value.code), err


def needed(peer: str) -> None:
    for package in bench_competitors.REQUIRED_PACKAGES[peer.split(":")[0]]:
        pytest.importorskip(package)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("command", ["decode", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_peer_writes_the_ids_that_ours_writes(command: str, peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed(peer)
    task = ["--tokens", "6", *(["--prompt-tokens", "9"] if command == "decode" else ["--streams", "3"])]
    found, _ = bench(capsys, command, *SMALL, *task, "--only", f"tinystories:fp32,{peer}", "--json")
    name = peer.replace(":", " ")
    scores = found[command]
    assert set(scores["tokens_per_s"]) == {"tinystories fp32", name}
    assert min(scores["tokens_per_s"].values()) > 0
    assert scores["same_ids"][name] == 1
    if not peer.startswith("torch"):
        assert scores["ratios"][f"tinystories fp32 / {name}"] > 0


def test_a_shortlist_is_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--tokens", "6", "--prompt-tokens", "9", "--shortlist", "9", "--only", "tinystories:int4,tinystories:int8"]
    found, _ = bench(capsys, "decode", *SMALL, *task, "--json")
    rows = ["tinystories int4", "tinystories int4, 9 ids", "tinystories int8", "tinystories int8, 9 ids"]
    assert list(found["decode"]["tokens_per_s"]) == rows
    same = found["decode"]["same_ids"]
    assert same[rows[1]] < same[rows[0]] == 1
    assert list(found["decode"]["ratios"]) == [f"{rows[1]} / {rows[0]}", f"{rows[3]} / {rows[2]}"]


def test_a_shortlist_is_compared_with_peers(capsys: pytest.CaptureFixture[str]) -> None:
    needed("llama.cpp")
    task = ["--tokens", "2", "--prompt-tokens", "2", "--shortlist", "9", "--only", "tinystories:fp32,llama.cpp:fp32"]
    found, _ = bench(capsys, "decode", *SMALL, *task, "--json")
    names = ["tinystories fp32 / llama.cpp fp32", "tinystories fp32, 9 ids / llama.cpp fp32"]
    assert list(found["decode"]["ratios"])[:2] == names


def test_classic_runs_beside_ctranslate2(capsys: pytest.CaptureFixture[str]) -> None:
    needed("ctranslate2")
    shape = ["--preset", "seed-89m", "--vocab", "64", "--runs", "1", "--tokens", "3", "--prompt-tokens", "4"]
    found, _ = bench(capsys, "decode", *shape, "--only", "tinystories:fp32,ctranslate2:fp32", "--json")
    assert found["decode"]["same_ids"]["ctranslate2 fp32"] == 1


def test_what_is_not_installed_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    gone = {"transformers", "ctranslate2", "llama_cpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    found, told = bench(capsys, "decode", *SMALL, "--tokens", "2", "--prompt-tokens", "2", "--peers", "--json")
    assert set(found["versions"]) == {"tinystories", "torch"}
    for name in ("transformers", "ctranslate2", "llama.cpp"):
        assert f"skipping {name}: it needs" in told


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
def test_what_cannot_be_measured_is_refused(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = bench(capsys, *words)
    assert code == 2
    assert reason in told.splitlines()[-1]


def test_a_program_that_ends_is_an_error_with_its_last_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    code, told = bench(capsys, "decode", *SMALL, "--tokens", "2", "--prompt-tokens", "2")
    assert code == 2
    assert told.splitlines()[-1] == "error: tinystories fp32 stopped: out of luck"
