"""benchmarks/gpu.py: output of a killed step survives, no step runs twice, and packed outputs stay within limits."""

import importlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PRINT_AND_WAIT = "import json, time; print(json.dumps({'benchmark': 'x', 'value': 7}), flush=True); time.sleep(60)"
PRINT = 'print(\'a line\'); print(\'{"benchmark": "x", "value": 8}\')'


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """Import the script as a module, ignoring any kit in this checkout."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "KIT", tmp_path / "kit")
    yield module
    for name in ("gpu", "gpu_plans"):
        sys.modules.pop(name)


@pytest.fixture
def plans(gpu: ModuleType) -> ModuleType:
    return sys.modules[gpu.train_plan.__module__]


def session_of(gpu: ModuleType, folder: Path, budget: float = 10_000.0) -> Any:
    return gpu.Session("measure", gpu.TOY, budget, folder / "work", folder / "out")


def python_step(gpu: ModuleType, name: str, program: str, limit: float = 10_000.0, floor: float = 0.0) -> Any:
    return gpu.Step(name, f"-c {shlex.quote(program)}", limit=limit, min_seconds=floor)


def test_step_that_is_cut_keeps_its_output(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is reached just after the step has printed its result, however long that takes."""
    session = session_of(gpu, tmp_path)
    timers: list[Any] = []
    record = session.record

    def start_timer(_: float, at_limit: Any, arguments: Any) -> MagicMock:
        timers.append(lambda: at_limit(*arguments))
        return MagicMock()

    def record_then_reach_the_limit(step: Any, **values: Any) -> None:
        record(step, **values)
        if "result" in values:
            for reach_limit in timers:
                reach_limit()

    monkeypatch.setattr(gpu.threading, "Timer", start_timer)
    monkeypatch.setattr(session, "record", record_then_reach_the_limit)
    session.run([python_step(gpu, "slow", PRINT_AND_WAIT, limit=0.0)])
    assert session.outcomes == {"slow": "cut"}
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert records[0]["result"]["value"] == 7
    assert {"name", "commit", "command", "at", "plan", "step"} <= records[0].keys()
    assert records[-1]["outcome"] == "cut"


def test_second_call_skips_finished_steps_and_retries_failed_ones(gpu: ModuleType, tmp_path: Path) -> None:
    steps = [python_step(gpu, "good", PRINT), python_step(gpu, "bad", "raise SystemExit('a reason')")]
    first = session_of(gpu, tmp_path)
    first.run(steps)
    assert first.outcomes == {"good": "done", "bad": "failed"}
    assert [record["last_line"] for record in first.records if record.get("outcome") == "failed"] == ["a reason"]
    second = session_of(gpu, tmp_path)
    second.run(steps)
    assert second.outcomes == {"good": "done before", "bad": "failed"}
    assert [result["value"] for result in second.results("x")] == [8]


def test_step_is_skipped_if_less_than_its_minimum_is_left(gpu: ModuleType, tmp_path: Path) -> None:
    session = session_of(gpu, tmp_path, budget=5000.0)
    session.run([python_step(gpu, "long", PRINT, floor=60000.0), python_step(gpu, "short", PRINT)])
    assert session.outcomes == {"long": "skipped", "short": "done"}


def test_truncated_record_is_ignored(gpu: ModuleType, tmp_path: Path) -> None:
    session_of(gpu, tmp_path).run([python_step(gpu, "good", PRINT)])
    path = tmp_path / "work" / "records.jsonl"
    path.write_text(path.read_text() + '{"step": "next", "outc')
    session = session_of(gpu, tmp_path)
    assert session.is_done(python_step(gpu, "good", PRINT))
    session.run([python_step(gpu, "later", PRINT)])
    assert len(session_of(gpu, tmp_path).results("x")) == 2, "a record follows the truncated line"


def test_another_machine_continues_from_the_records_in_the_kit(gpu: ModuleType, tmp_path: Path) -> None:
    step = python_step(gpu, "good", PRINT)
    session_of(gpu, tmp_path / "first").run([step])
    (tmp_path / "kit").mkdir()
    (tmp_path / "first" / "out" / "records.jsonl").rename(tmp_path / "kit" / "records.jsonl")
    session = session_of(gpu, tmp_path / "second")
    session.run([step])
    assert session.outcomes == {"good": "done before"}
    assert session_of(gpu, tmp_path / "second").is_done(step)
    assert (tmp_path / "second" / "out" / "records.jsonl").read_text().count('"value": 8') == 1


def trained(session: Any, gpu: ModuleType, run: str, score: float, parameters: float, megabytes: float) -> None:
    """Record a result and weights as if a step had trained a model."""
    result = {"benchmark": "timed training", "run": run, "val_bits_per_byte": score, "parameters": parameters}
    session.record(python_step(gpu, run, ""), result=result)
    (session.work / "weights").mkdir(exist_ok=True)
    for kind, size in (("int8", megabytes), ("fp16", 2 * megabytes)):
        (session.work / "weights" / f"{run}-{kind}.tar").write_bytes(run.encode() * int(size * 1e6 / len(run)))


def test_weights_are_packed_best_first_while_they_fit(gpu: ModuleType, tmp_path: Path) -> None:
    session = session_of(gpu, tmp_path)
    trained(session, gpu, "worse", 0.6, 14e6, 14)
    trained(session, gpu, "best", 0.5, 14e6, 14)
    trained(session, gpu, "teacher", 0.4, 29e6, 15)
    gpu.pack_outputs(session)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(files) == {
        "records.jsonl", "logs.tar.gz", "1-best-int8.tar", "1-best-fp16.tar.0", "1-best-fp16.tar.1", "2-worse-int8.tar"
    }  # fmt: skip
    assert len(files) <= gpu.MAX_FILES
    assert max(files.values()) <= gpu.MAX_FILE_BYTES
    assert sum(files.values()) <= gpu.MAX_TOTAL_BYTES
    parts = b"".join((tmp_path / "out" / f"1-best-fp16.tar.{part}").read_bytes() for part in (0, 1))
    assert parts == (session.work / "weights" / "best-fp16.tar").read_bytes()


def test_candidates_for_the_bundle_are_small_enough(plans: ModuleType) -> None:
    from tinystories.config_file import load_config

    def parameters(settings: str) -> int:
        words = shlex.split(settings)
        named = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        return load_config("storyteller", named | {"model.vocab_size": "4096"}).model.n_params

    assert 14e6 < parameters(plans.GPU.candidate) <= 15e6
    assert 28e6 < parameters(plans.GPU.teacher) < 31e6


def commands_of(plan: Iterator[list[Any]], session: Any) -> list[str]:
    commands = []
    for steps in plan:
        commands += [step.command for step in steps]
        session.deadline -= 60  # as if each stage had taken a minute
    return commands


def test_teachers_are_trained_before_the_student_if_distillation_is_supported(
    gpu: ModuleType, plans: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(gpu, tmp_path, budget=420)
    session.config = gpu.GPU
    assert plans.has_teachers(), "this version has them"
    monkeypatch.setattr(plans, "has_teachers", lambda: False)
    without = commands_of(gpu.train_plan(session), session)
    assert len(without) == 4
    assert not any("--train.teacher" in command for command in without)
    monkeypatch.setattr(plans, "has_teachers", lambda: True)
    session = session_of(gpu, tmp_path, budget=420)
    session.config = gpu.GPU
    *links, student = commands_of(gpu.train_plan(session), session)[3:]
    assert len(links) >= 2
    assert "--train.teacher" not in links[0]
    assert f"--train.teacher {session.work}/link1" in links[1]
    assert "--train.teacher" in student
    assert all(f"{session.work}/link{i + 1}" in student for i in range(len(links)))


def test_long_run_uses_the_best_weight_decay(gpu: ModuleType, tmp_path: Path) -> None:
    session = session_of(gpu, tmp_path, budget=420)
    session.config = gpu.GPU
    for decay, score in (("0.1", 0.6), ("1.6", 0.55), ("0.8", 0.58)):
        trained(session, gpu, f"candidate-decay{decay}", score, 14e6, 0.1)
    assert "--optim.weight_decay 1.6" in commands_of(gpu.train_plan(session), session)[-1]
