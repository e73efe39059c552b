"""The campaign reports planted faults, and nothing without them."""

import random
import shutil
import signal
import struct
from pathlib import Path

import pytest

from campaign import fuzz, kill, signals
from campaign.full_disk import Server, attack
from campaign.mutations import MUTATIONS, gguf_numbers
from campaign.program import ROOT, judge, run_or_fail
from campaign.record import Record

pytestmark = pytest.mark.extended

SHORT_RUN = ["--train.steps", "40", "--train.checkpoint_every", "2"]
BUNDLED = ROOT / "src" / "tinystories" / "bundled"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with few valid files, which are made in a second: a config, stories, and the bundled model."""
    folder = tmp_path_factory.mktemp("campaign")
    base = folder / "base"
    (base / "toml").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "nano.toml", base / "toml" / "config.toml")
    run_or_fail(folder, "import", BUNDLED, "--out", base / "model")
    shutil.copytree(base / "model", base / "hf-llama")
    return folder


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("test", {}, tmp_path)


def problems(record: Record) -> set[str]:
    return {finding["problem"] for finding in record.findings}


def fuzz_toml(record: Record, work: Path, plant: str | None) -> None:
    fuzz.fuzz(record, work, "toml", seed=0, first=0, count=8, seconds=120, plant=plant)


def test_fuzz_finds_nothing_without_a_fault(record: Record, work: Path) -> None:
    fuzz_toml(record, work, None)
    assert not record.findings
    assert record.counts["inputs"] == 8
    assert record.counts["toml code 2"] > 0


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        ("reader-raises", "traceback: KeyError: 'planted'"),
        ("reader-crashes", "the process died: exit code 139"),
        ("reader-exhausts-memory", "memory exhausted"),
    ],
)
def test_fuzz_reports_a_faulty_reader(record: Record, work: Path, plant: str, problem: str) -> None:
    fuzz_toml(record, work, plant)
    assert problems(record) == {problem}
    folder = next((record.folder / "test").iterdir())
    assert (folder / "input" / "config.toml").exists()
    assert "--replay" in (folder / "finding.json").read_text()


def test_full_disk_reports_writes_that_are_not_atomic(record: Record, work: Path) -> None:
    for plant, expected in ((None, set()), ("not-atomic", {"model is neither what it was nor complete"})):
        server = Server(work, plant)
        if server.library is None:
            server.close()
            pytest.skip("needs Linux and a C compiler")
        try:
            attack(record, work, work / "base", server, "import", points=3, sizes=0)
        finally:
            server.close()
        assert problems(record) == expected


def test_signals_reports_an_ignored_signal(record: Record, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 2.0)
    folder = work / "signals"
    for plant, expected in ((None, set()), ("deaf", {"still running 2 s after SIGTERM"})):
        signals.interrupt(record, work, work / "base", folder, "generate", signal.SIGTERM, 3.0, plant)
        assert problems(record) == expected


@pytest.mark.slow
def test_kill_reports_a_run_that_resumes_with_other_state(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "SETTINGS", [*SHORT_RUN, "--train.eval_every", "40"])
    run_or_fail(tmp_path, "prepare", "sample", "--tokenizer", "bpe:300", "--out", "base/data")
    kill.kill(record, tmp_path, kills=3, seed=0, plant="lost-state")
    assert problems(record) == {"the final weights differ from those of a straight run"}


def test_mutations_depend_on_the_seed_alone() -> None:
    data = b'{"a": [1, {"b": "c"}], "d": null}\n' * 4
    for kind, mutations in MUTATIONS.items():
        if kind != ".db":
            for mutation in mutations:
                assert mutation(data, random.Random(3)) == mutation(data, random.Random(3)), mutation


def test_the_numbers_of_a_gguf_header_are_known() -> None:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 4) + struct.pack("<I", 7)
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 0)
    data = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + tensor
    offsets = [at for at, _ in gguf_numbers(data)]
    assert offsets == [24, 33, 37, 41, 50, 54, 62, 66]


@pytest.mark.parametrize(
    ("code", "stderr", "problem"),
    [
        (0, "a note\n", None),
        (2, "resuming\nerror: no such file\n", None),
        (130, "stopped\n", None),
        (1, "error: disk full\n", "exit code 1"),
        (139, "", "exit code 139"),
        (2, "", "exit code 2 without an error line"),
        (2, "error: a\nb\n", "an error of several lines"),
        (0, "a \x1b[31m name\n", "control characters in a message"),
        (1, "Traceback (most recent call last):\n  File\nKeyError: 'x'\n", "traceback: KeyError: 'x'"),
    ],
)
def test_exit_codes_and_messages_that_are_accepted(code: int, stderr: str, problem: str | None) -> None:
    assert judge(code, stderr) == problem
