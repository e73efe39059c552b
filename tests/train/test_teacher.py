"""Training with teachers: what it changes, what it refuses, and that it can be resumed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import changed, read_records
from torch.nn.functional import kl_div

from tinystories import checkpoint
from tinystories.config import Config
from tinystories.data.prepare import prepare
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.train.loop import Interrupted, Trainer
from tinystories.train.run import train
from tinystories.train.teacher import load_teachers


@pytest.fixture
def short(config: Config) -> Config:
    return changed(config, "train", steps=4, eval_every=10, checkpoint_every=10)


@pytest.fixture
def teacher(short: Config, tmp_path: Path) -> str:
    """A run of another size and architecture on the same data."""
    run = tmp_path / "teacher"
    train(changed(short, "model", architecture="classic", n_layer=1, n_ctx=48), run)
    return str(run)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_a_teacher_of_weight_zero_changes_nothing(short: Config, teacher: str, tmp_path: Path) -> None:
    train(short, tmp_path / "alone")
    train(changed(short, "train", teacher=(teacher,), teacher_weight=0.0), tmp_path / "weightless")
    train(changed(short, "train", teacher=(teacher,)), tmp_path / "taught")
    assert weights(tmp_path / "weightless") == weights(tmp_path / "alone")
    assert weights(tmp_path / "taught") != weights(tmp_path / "alone")


def test_the_metrics_show_the_cross_entropy_alone(short: Config, teacher: str, tmp_path: Path) -> None:
    short = changed(short, "train", log_every=1)
    for name, settings in {"alone": {}, "taught": {"teacher": (teacher, teacher), "teacher_weight": 7.0}}.items():
        train(changed(short, "train", **settings), tmp_path / name)
    first = [read_records(tmp_path / run)[0]["loss"] for run in ("alone", "taught")]
    assert first[1] == pytest.approx(first[0], rel=1e-5), "the first step is taken with equal weights"
    provenance = checkpoint.read_model(tmp_path / "taught").provenance
    assert provenance["teachers"] == [teacher, teacher]


def test_a_student_comes_closer_to_its_teacher(short: Config, tmp_path: Path) -> None:
    train(changed(short, "train", steps=60), tmp_path / "teacher")
    short = changed(short, "train", steps=20)
    settings = {"teacher": (str(tmp_path / "teacher"),), "teacher_weight": 10.0}
    models = [TorchEngine.load(checkpoint.read_model(tmp_path / "teacher")).model]
    for name, extra in {"alone": {}, "taught": settings}.items():
        train(changed(short, "train", **extra), tmp_path / name)
        models.append(TorchEngine.load(checkpoint.read_model(tmp_path / name)).model)
    ids = np.fromfile(Path(short.data.dir) / "val.bin", dtype=np.uint16)[: 8 * 32]
    tokens = torch.from_numpy(ids.astype(np.int64)).view(8, 32)
    with torch.inference_mode():
        teacher_p, *log_p = [model.eval().logits(model(tokens)).log_softmax(-1) for model in models]
    alone, taught = [kl_div(p, teacher_p, log_target=True, reduction="batchmean").item() for p in log_p]
    assert taught < 0.9 * alone


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_interrupted_run_with_teachers_ends_with_the_same_bits(
    short: Config, teacher: str, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = changed(short, "train", teacher=(teacher,), teacher_temperature=temperature)
    train(short, tmp_path / "straight")
    step = Trainer.train_step

    def stopping(self: Trainer, at: int) -> object:
        self.received_signal = 15 if at == 1 else 0
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Interrupted):
            train(short, tmp_path / "broken")
    train(short, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_a_teacher_with_another_tokenizer_is_refused(short: Config, teacher: str, tmp_path: Path) -> None:
    prepare("sample", tmp_path / "data", tokenizer="bpe:300", val_fraction=0.05, progress=False)
    other = changed(changed(short, "data", dir=str(tmp_path / "data")), "train", teacher=(teacher,))
    with pytest.raises(UserError, match=rf"train.teacher: {teacher} has another tokenizer than the data; prepare"):
        train(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_shorter_context_is_refused(short: Config, teacher: str, tmp_path: Path) -> None:
    longer = changed(changed(short, "model", n_ctx=64), "train", teacher=(teacher,))
    with pytest.raises(UserError, match=r"context of 48 tokens, which is less than model\.n_ctx=64"):
        train(longer, tmp_path / "run")


def test_a_teacher_with_a_padded_vocabulary_is_refused(teacher: str) -> None:
    config = checkpoint.read_model(Path(teacher)).config
    with pytest.raises(UserError, match=r"model\.vocab_size=400, this run 448"):
        load_teachers(
            [teacher],
            dataclasses.replace(config, vocab_size=448),
            checkpoint.read_model(Path(teacher)).tokenizer(),
            torch.device("cpu"),
        )


def test_a_teacher_that_does_not_exist_is_refused(short: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        train(changed(short, "train", teacher=(str(tmp_path / "nowhere"),)), tmp_path / "run")


def test_the_settings_of_a_run_name_its_teachers(short: Config, teacher: str, tmp_path: Path) -> None:
    train(changed(short, "train", teacher=(teacher, teacher)), tmp_path / "run")
    assert f"teacher = [\n    {json.dumps(teacher)}," in (tmp_path / "run" / "config.toml").read_text()
