"""A step is launched before the previous one is read; times are those of the device, not of the host."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import changed, read_records
from torch.utils._python_dispatch import TorchDispatchMode

from tinystories.config import Config
from tinystories.train import loop
from tinystories.train.loop import Interrupted, Trainer
from tinystories.train.recording.metrics import Metrics
from tinystories.train.run import train
from tinystories.train.step import StepResult

TRAIN_STEP = Trainer.train_step
READING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal", "aten.masked_select")


class NothingIsRead(TorchDispatchMode):
    """Fail on any operation that would make the host wait for a tensor's values on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(READING), f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_reads_nothing_from_the_device(config: Config, tmp_path: Path, architecture: str, kind: str) -> None:
    config = changed(config, "model", architecture=architecture, tied=architecture == "modern")
    trainer = Trainer(changed(config, "optim", kind=kind), tmp_path)
    trainer.train_step(0)
    with NothingIsRead():
        result = trainer.train_step(1)
        with pytest.raises(AssertionError, match="reads from the device"):
            result.loss.item()
    assert result.read() == (result.loss.item(), result.grad_norm.item())


class Device:
    """Fake device that takes one second per step, with a fake clock for the host."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.events: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def launch(self, trainer: Trainer, step: int) -> StepResult:
        """Stand in for `Trainer.train_step`: it takes the host 0.01 s, and the device has a result a second later."""
        device, result = self, TRAIN_STEP(trainer, step)
        self.now += 0.01
        done_at = self.free_at = max(self.free_at, self.now) + 1.0
        self.events.append(("launch", result.step))

        class Slow(StepResult):
            def __init__(self) -> None:
                self.__dict__ = result.__dict__

            def read(self) -> tuple[float, float]:
                device.now = max(device.now, done_at)
                device.events.append(("read", result.step))
                return result.read()

        return Slow()

    def while_it_works(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """Wrap the function so that it takes the host `seconds` on the fake clock."""

        def slow(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return function(*arguments, **named)

        return slow


def test_the_device_always_has_the_next_step_but_where_the_run_pauses(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    monkeypatch.setattr(Trainer, "train_step", lambda trainer, step: device.launch(trainer, step))
    monkeypatch.setattr(loop, "is_async_device", lambda _: True)
    train(config, tmp_path / "run")
    paused = [step for step in range(1, 13) if step % 4 == 0 or step % 5 == 0]  # checkpoints and evaluations
    expected = []
    for step in range(1, 13):
        expected += [("launch", step)]
        expected += [("read", step - 1)] * (step > 1 and step - 1 not in paused) + [("read", step)] * (step in paused)
    assert device.events == expected
    assert [r["step"] for r in read_records(tmp_path / "run") if "loss" in r] == [2, 4, 6, 8, 10, 12]


def test_time_is_that_of_the_device_and_not_of_evaluations_or_checkpoints(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    monkeypatch.setattr(Trainer, "train_step", lambda trainer, step: device.launch(trainer, step))
    monkeypatch.setattr(loop, "is_async_device", lambda _: True)
    monkeypatch.setattr(loop, "time", device)
    monkeypatch.setattr(Metrics, "write", device.while_it_works(Metrics.write, 0.3))
    monkeypatch.setattr(Trainer, "evaluate", device.while_it_works(Trainer.evaluate, 100.0))
    monkeypatch.setattr(Trainer, "save_checkpoint", device.while_it_works(Trainer.save_checkpoint, 50.0))
    train(config, tmp_path / "run")
    lines = [r for r in read_records(tmp_path / "run") if "loss" in r]
    # The first step after a pause also includes its launch time; the pauses are after steps 4, 5, 8 and 10.
    waits = {2: 1, 4: 1, 6: 3, 8: 3, 10: 4, 12: 5}
    assert {r["step"]: r["seconds"] for r in lines} == pytest.approx({k: k + 0.01 * n for k, n in waits.items()})
    (second,) = [b["tokens"] - a["tokens"] for a, b in itertools.pairwise(lines) if b["step"] == 4]
    assert lines[1]["tokens_per_s"] == pytest.approx(second / 2.0, rel=1e-3)


def test_a_line_tells_the_time_of_its_own_steps(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a step is finished when its launch returns; here each takes a second."""
    clock = Device()
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(Trainer, "train_step", clock.while_it_works(Trainer.train_step, 1.0))
    train(config, tmp_path / "run")
    lines = [r for r in read_records(tmp_path / "run") if "loss" in r]
    assert [r["seconds"] for r in lines] == [r["step"] for r in lines]
    for before, line in itertools.pairwise(lines):
        assert line["tokens_per_s"] == pytest.approx((line["tokens"] - before["tokens"]) / 2.0, rel=1e-3)


def test_batches_made_ahead_give_the_same_bits_over_an_interrupt(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, ahead = tmp_path / "straight", tmp_path / "ahead"
    train(config, straight)
    monkeypatch.setattr(loop, "is_async_device", lambda _: True)
    plain, taken = Trainer.train_step, []

    def stopping(self: Trainer, step: int) -> Any:
        assert self.batches is not None
        taken.append(step)
        self.received_signal = 15 if step == 6 and len(taken) == 7 else 0
        return plain(self, step)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Interrupted):
        train(config, ahead)
    train(config, ahead, resume=True)
    assert taken == list(range(12))
    assert (ahead / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_an_error_while_making_a_batch_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_async_device", lambda _: True)
    plain = Trainer.make_batch

    def broken_disk(self: Trainer, step: int) -> Any:
        if step == 3:
            raise OSError("the disk is gone")
        return plain(self, step)

    monkeypatch.setattr(Trainer, "make_batch", broken_disk)
    with pytest.raises(OSError, match="the disk is gone"):
        train(config, tmp_path / "run")


def test_a_batch_out_of_turn_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "is_async_device", lambda _: True)
    trainer = Trainer(config, tmp_path)
    with trainer.prefetch_batches(), pytest.raises(AssertionError, match="step 0 comes next, not 4"):
        trainer.train_step(4)
