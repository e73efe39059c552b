"""Training runs in one process: learning, files written, resuming, and settings that are refused."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import changed, read_records
from safetensors.torch import load_file

from tinystories import checkpoint
from tinystories.config import Config
from tinystories.config_file import load_config
from tinystories.data.prepare import prepare
from tinystories.errors import UserError
from tinystories.train import estimate, state
from tinystories.train.distributed import World
from tinystories.train.loop import Interrupted, Trainer
from tinystories.train.run import train
from tinystories.train.step import StepResult

pytestmark = pytest.mark.extended


def without_clock(run: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_s")
    return [{key: value for key, value in record.items() if key not in timed} for record in read_records(run)]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Simulate SIGTERM during the given step."""
    plain = Trainer.train_step

    def stopping(self: Trainer, at: int) -> Any:
        if at == step - 1:
            self.received_signal = 15
        return plain(self, at)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_run_leaves_a_model_a_curve_and_stories(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = train(config, run)
    assert report is not None
    files = checkpoint.read_model(run)
    assert files.config.vocab_size == 400
    assert files.provenance["val_bits_per_byte"] == report.bits_per_byte
    assert files.provenance["step"] == 12
    assert load_config(run / "config.toml").model == files.config
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (run / "samples.md").read_text()
    assert samples.count("## Step") == 3
    assert samples.count("> The cat") == 3
    final = read_records(run)[-1]
    assert final["final"] is True
    assert final["val_stories"] == report.stories > config.train.eval_stories
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl")) + list(run.rglob("*.draft"))


def test_the_loss_of_a_run_falls(config: Config, tmp_path: Path) -> None:
    config = changed(changed(config, "train", steps=60, eval_every=100), "model", dropout=0.0)
    train(config, tmp_path / "run")
    losses = [r["loss"] for r in read_records(tmp_path / "run") if "loss" in r]
    assert losses[0] == pytest.approx(math.log(400), rel=0.02)
    assert losses[-1] < losses[0] - 0.8


@pytest.mark.parametrize("step", [3, 4, 5, 9])
def test_an_interrupted_run_ends_with_the_same_bits(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(config, straight)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted) as stop:
            train(config, broken)
    assert stop.value.step == step
    assert checkpoint.read_model(broken).provenance["step"] == step
    train(config, broken, resume=True)
    assert (broken / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    name = "checkpoints/step-0000012/state/optimizer.safetensors"
    assert (broken / name).read_bytes() == (straight / name).read_bytes()
    assert [r["step"] for r in without_clock(broken) if "val_stories" in r] == [5, 10, 12]
    evaluations = [[r for r in without_clock(run) if "val_stories" in r] for run in (straight, broken)]
    assert evaluations[0] == evaluations[1]
    assert (broken / "samples.md").read_text() == (straight / "samples.md").read_text()


def test_a_signal_that_arrives_while_the_ranks_agree_stops_the_next_step(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = World.all_reduce_max, []

    def interrupted(self: World, value: int) -> int:
        agreed = plain(self, value)
        calls.append(agreed)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(World, "all_reduce_max", interrupted)
    with pytest.raises(Interrupted, match="SIGTERM at step 4"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_an_interrupt_during_an_evaluation_loses_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(config, straight)
    plain, calls = Trainer.evaluate, []

    def stopping(self: Trainer, *arguments: Any) -> Any:
        calls.append(self.train_state.step)
        if len(calls) == evaluation:
            self.received_signal = 15
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", stopping)
        with pytest.raises(Interrupted):
            train(config, broken)
    train(config, broken, resume=True)
    assert without_clock(broken) == without_clock(straight)
    assert (broken / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_run_may_begin_with_the_weights_of_another(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "first")
    first = load_file(tmp_path / "first" / "model.safetensors")
    longer = changed(changed(config, "model", n_ctx=48, dropout=0.0), "train", init=str(tmp_path / "first"))
    train(changed(longer, "optim", learning_rate=1e-12, muon_rate=1e-12), tmp_path / "still")
    for name, weight in load_file(tmp_path / "still" / "model.safetensors").items():
        torch.testing.assert_close(weight, first[name], atol=1e-9, rtol=0)
    train(longer, tmp_path / "second")
    scores = [read_records(tmp_path / run)[-1]["val_bits_per_byte"] for run in ("still", "second")]
    assert scores[1] < scores[0], "it has learned more"
    described = checkpoint.read_model(tmp_path / "second")
    assert (described.config.n_ctx, described.provenance["began_with"]) == (48, str(tmp_path / "first"))


def test_a_run_cannot_begin_with_other_shapes_or_ids(config: Config, tmp_path: Path) -> None:
    train(changed(config, "train", steps=1), tmp_path / "first")
    further = changed(config, "train", init=str(tmp_path / "first"))
    with pytest.raises(UserError, match=r"first: the config has other settings \(n_ff=64\): use --model\.n_ff 32"):
        train(changed(further, "model", n_ff=64), tmp_path / "other")
    with pytest.raises(UserError, match="nowhere: no such model directory"):
        train(changed(config, "train", init="nowhere"), tmp_path / "other")
    prepare("sample", tmp_path / "data", tokenizer="bpe:400", val_fraction=0.2, progress=False)
    with pytest.raises(UserError, match="another tokenizer than the data"):
        train(changed(further, "data", dir=str(tmp_path / "data")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_resuming_a_finished_run_changes_nothing(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert train(config, tmp_path / "run", resume=True) is None
    assert {p: p.read_bytes() for p in before} == before


def test_a_finished_run_can_go_on_to_more_steps(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    train(changed(config, "train", steps=16), tmp_path / "run", resume=True)
    assert checkpoint.read_model(tmp_path / "run").provenance["step"] == 16
    assert read_records(tmp_path / "run")[-1]["final"] is True


def test_resuming_where_nothing_was_saved_starts_from_scratch(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    train(config, run, resume=True)
    assert next(iter(read_records(run)))["step"] == 2


def test_a_damaged_checkpoint_is_passed_over(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(config, straight)
    train(config, run)
    for name in ("model.safetensors", "state/optimizer.safetensors"):
        folder = state.find_latest_checkpoint(run)
        assert folder is not None
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
        train(config, run, resume=True)
        assert "damaged checkpoint" in caplog.text
        assert (run / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(config, run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resuming_publishes_what_a_kill_left_unpublished(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").write_bytes(weights[:-4])
    train(config, run, resume=True)
    assert checkpoint.read_model(run).provenance["step"] == 12


def test_gradient_accumulation_does_not_change_the_gradient(config: Config, tmp_path: Path) -> None:
    config = changed(config, "model", dropout=0.0)
    weights = []
    for micro_batch in (1, 2, 8):
        trainer = Trainer(changed(config, "train", micro_batch=micro_batch), tmp_path)
        for step in range(3):
            trainer.train_step(step)
        weights.append(torch.cat([w.flatten() for w in trainer.model.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-3, atol=1e-4)


def test_a_seed_decides_the_run_and_another_seed_another_one(config: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(changed(config, "train", steps=2, seed=seed), tmp_path / name)
    same, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert same == again
    assert same != other


def test_gradients_are_clipped(config: Config, tmp_path: Path) -> None:
    trainer = Trainer(changed(config, "optim", grad_clip=1e-3), tmp_path)
    seen = []
    plain = trainer.optimizers[0].step

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None]).norm())
        return plain(*args, **kwargs)

    trainer.optimizers[0].step = spy  # type: ignore[method-assign]
    trainer.train_step(0)
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad_step", [7, 8, 10])  # an ordinary one, one with a checkpoint, one with an evaluation
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, bad_step: int
) -> None:
    plain = Trainer.train_step

    def exploding(self: Trainer, step: int) -> Any:
        result = plain(self, step)
        if step == bad_step - 1:
            with torch.no_grad():
                self.model.norm.weight.fill_(float("nan"))
            loss, norm = result.loss, result.grad_norm
            loss, norm = (loss * float("nan"), norm) if where == "loss" else (loss, norm * float("inf"))
            return StepResult(result.step, result.n_targets, result.learning_rate, loss, norm)
        return result

    monkeypatch.setattr(Trainer, "train_step", exploding)
    good = "step-0000008" if bad_step == 10 else "step-0000005"
    with pytest.raises(UserError, match=rf"step {bad_step} are not finite.*{good}.*optim\.learning_rate"):
        train(config, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_the_newest_and_the_best_checkpoints_are_kept(config: Config, tmp_path: Path) -> None:
    config = changed(config, "train", steps=14, checkpoint_every=1, eval_every=3, keep_checkpoints=2)
    train(config, tmp_path / "run")
    steps = [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run")]
    last = state.find_latest_checkpoint(tmp_path / "run")
    assert last is not None
    best = state.read_train_state(last).best_step
    assert steps == sorted({best, 13, 14})


def test_a_run_that_cannot_fit_is_refused_with_the_estimate(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "get_free_bytes", lambda _: 10**5)
    with pytest.raises(UserError, match=r"needs about \d+\.\d GB .*train\.micro_batch"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("room_for", "used_before", "expected"), [(8, 0, 8), (7, 0, 4), (3, 0, 2), (8, 2, 2), (1, 2, 1)]
)
def test_auto_takes_the_largest_part_of_the_batch_that_fits(
    config: Config, monkeypatch: pytest.MonkeyPatch, room_for: int, used_before: int, expected: int
) -> None:
    """Unless a resumed run used a smaller one before: it is kept, so that the order of sums stays the same."""
    config = changed(changed(config, "train", batch_size=8, micro_batch="auto"), "model", vocab_size=400)
    needed = estimate.estimate_train_bytes(config, room_for) / estimate.MEMORY_FRACTION
    monkeypatch.setattr(estimate, "get_free_bytes", lambda _: int(needed) + 1)
    assert estimate.auto_micro_batch(config, torch.device("cpu"), used_before) == expected


def test_auto_with_no_room_at_all_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "get_free_bytes", lambda _: 10**5)
    with pytest.raises(UserError, match=r"needs about \d+\.\d GB .*train\.micro_batch=1"):
        train(changed(config, "train", micro_batch="auto"), tmp_path / "run")


def test_a_run_on_auto_goes_on_with_the_part_it_began_with(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if more fits by then: a different order of sums would change the bits."""
    config = changed(config, "train", batch_size=8, micro_batch="auto", steps=2)
    plenty, used = estimate.get_free_bytes, []
    tight = estimate.estimate_train_bytes(changed(config, "model", vocab_size=400), 4) / estimate.MEMORY_FRACTION
    monkeypatch.setattr(estimate, "get_free_bytes", lambda _: int(tight) + 1)
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, i: used.append(self.take_step.micro_batch) or step(self, i))
    train(config, tmp_path / "run")
    monkeypatch.setattr(estimate, "get_free_bytes", plenty)
    train(changed(config, "train", steps=4), tmp_path / "run", resume=True)
    train(config, tmp_path / "other")
    assert used == [4, 4, 4, 4, 8, 8]


def test_places_that_hold_something_are_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train(config, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--out .* choose another"):
        train(config, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    train(changed(config, "train", steps=1), tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "values"),
    [("model", {"n_layer": 1}), ("train", {"seed": 3}), ("train", {"batch_size": 4}), ("optim", {"kind": "adamw"})],
)
def test_resuming_with_what_would_change_the_weights_is_refused(
    config: Config, tmp_path: Path, section: str, values: dict[str, Any]
) -> None:
    train(changed(config, "train", steps=1), tmp_path / "run")
    with pytest.raises(UserError, match=f"{section}.*was trained with"):
        train(changed(config, section, **values), tmp_path / "run", resume=True)


def test_resuming_on_other_data_is_refused(config: Config, tmp_path: Path, sample_data: Path) -> None:
    train(changed(config, "train", steps=1), tmp_path / "run")
    (tmp_path / "one.txt").write_text("A dog ran.\n<|endoftext|>\n" * 3 + "It was a long, long day.\n<|endoftext|>\n")
    tokenizer = str(sample_data / "tokenizer.json")
    prepare(tmp_path / "one.txt", tmp_path / "data", tokenizer=tokenizer, progress=False)
    with pytest.raises(UserError, match=r"--data .* is not the data"):
        train(changed(config, "data", dir=str(tmp_path / "data")), tmp_path / "run", resume=True)


def test_another_vocabulary_than_asked_for_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size=999 but the data .* has 400"):
        train(changed(config, "model", vocab_size=999), tmp_path / "run")


def test_a_tokenizer_that_is_not_the_datas_is_refused(config: Config, tmp_path: Path, sample_data: Path) -> None:
    for path in sample_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    text["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="prepare the data again"):
        train(changed(config, "data", dir=str(tmp_path)), tmp_path / "run")


def test_a_run_without_validation_stories_trains_all_the_same(config: Config, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("A dog ran.\n<|endoftext|>\nIt was a long, long day.\n<|endoftext|>\n")
    prepare(tmp_path / "one.txt", tmp_path / "data", tokenizer="bpe:260", val_fraction=0.0, progress=False)
    config = changed(changed(config, "data", dir=str(tmp_path / "data")), "train", steps=6)
    assert train(config, tmp_path / "run") is None
    assert checkpoint.read_model(tmp_path / "run").provenance["step"] == 6


def test_tensorboard_events_are_written_only_when_asked(config: Config, tmp_path: Path) -> None:
    train(changed(config, "train", steps=2, tensorboard=True), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    train(changed(config, "train", steps=1), tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_the_first_loss_of_a_seed_is_golden(config: Config, tmp_path: Path) -> None:
    result = Trainer(config, tmp_path).train_step(0)
    assert result.n_targets == 256
    assert result.loss.item() == pytest.approx(5.9914, abs=0.02), (
        "initialization, data order or loss changed: if that was intended, say so in CHANGELOG.md and set the new value"
    )


def test_estimates_are_near_the_truth(config: Config) -> None:
    model = dataclasses.replace(config.model, vocab_size=400)
    by_hand = 6 * (2 * (4 * 16 * 16 + 3 * 16 * 32) + 400 * 16) + 6 * 2 * 32 * 16
    norms = 6 * (2 * (2 * 16 + 2 * 8) + 16)
    assert estimate.estimate_flops_per_token(model) == by_hand + norms
    sized = changed(config, "model", vocab_size=400)
    assert estimate.estimate_train_bytes(sized, 8) > estimate.estimate_train_bytes(sized, 4)
    assert np.isfinite(estimate.estimate_train_seconds(sized, torch.device("cpu")))
