"""Bits per byte of a tokenizer that loses text are marked wherever they are shown.

Reported: a word-level tokenizer with <unk> got far better bits per byte than an honest one, without a warning.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from click.testing import CliRunner
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tinystories import checkpoint
from tinystories.cli import cli
from tinystories.config import Config, DataConfig, ModelConfig, TrainConfig
from tinystories.data.dataset import read_meta
from tinystories.data.prepare import prepare
from tinystories.data.source.resolve import iter_stories
from tinystories.data.staging import StagingDir
from tinystories.data.text_loss import MIN_SHARE, TextLoss, describe_loss
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.formats.bundle import ModelBundle
from tinystories.hub.card import build_model_card
from tinystories.sweep.results import TrialResult, describe_result, format_table
from tinystories.sweep.trial import read_outcome, trial_dir
from tinystories.train.run import train

NOTE = "not comparable: the tokenizer cannot give back"
TEXT = "Lily saw a café.  Tom ran\tto the house, and all of them were very happy to be there again. " * 3


def word_level() -> tokenizers.Tokenizer:
    """The reported kind: words, of which the rare ones become <unk>."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(iter_stories("sample"), trainer)
    return backend


def byte_level(
    normalizer: normalizers.Normalizer | None = None, pre_tokenizer: pre_tokenizers.PreTokenizer | None = None
) -> tokenizers.Tokenizer:
    """Bytes, after a normalizer and a pre-tokenizer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, plain]) if pre_tokenizer else plain
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def words_of_bytes() -> tokenizers.Tokenizer:
    """Whole words whose names look like bytes; other words become <unk>."""
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<unk>"]
    backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def stripping_token() -> tokenizers.Tokenizer:
    """An added word that swallows the white space after it."""
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("Lily", rstrip=True, normalized=False)])
    return backend


LOSSY: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "reported: <unk>": word_level,
    "lower case": lambda: byte_level(normalizers.Lowercase()),
    "no accents": lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "no white space": lambda: byte_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    "runs of white space": lambda: byte_level(normalizers.Replace(tokenizers.Regex(r"\s+"), " ")),
    "words of bytes": words_of_bytes,
    "an added token that strips": stripping_token,
}


def measure(tokenizer: Tokenizer, text: str) -> TextLoss:
    loss = TextLoss()
    loss.add(tokenizer, [text], [tokenizer.encode(text)])
    return loss


@pytest.mark.parametrize("kind", LOSSY)
def test_every_loss_is_seen(kind: str) -> None:
    loss = measure(Tokenizer(LOSSY[kind]().to_str()), TEXT)
    assert MIN_SHARE <= loss.share <= 1
    assert " comes back as " in loss.example
    assert describe_loss(loss.share).startswith(NOTE)


def test_no_loss_is_seen_where_there_is_none() -> None:
    for backend in (byte_level(), byte_level(normalizers.NFC()), byte_level(pre_tokenizer=pre_tokenizers.Digits())):
        loss = measure(Tokenizer(backend.to_str()), TEXT)
        assert (loss.share, loss.example, describe_loss(loss.share)) == (0, "", "")


def test_a_rare_character_is_neglected() -> None:
    tokenizer = Tokenizer(byte_level(normalizers.NFC()).to_str())
    text = "cafe\u0301 " + "a house by the sea " * 300
    assert (measure(tokenizer, text).n_lost, measure(tokenizer, text).share) == (2, 0)
    assert measure(tokenizer, "cafe\u0301").share == pytest.approx(0.4)


@pytest.fixture(scope="module")
def lossy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossy")
    word_level().save(str(folder / "words.json"))
    prepare("sample", folder / "data", tokenizer=str(folder / "words.json"), val_fraction=0.1, progress=False)
    return folder / "data"


def config_for(data: Path, **changes: Any) -> Config:
    return Config(
        model=ModelConfig(n_ctx=32, n_layer=1, n_head=2, n_embd=16, n_ff=32),
        data=DataConfig(dir=str(data)),
        train=TrainConfig(
            **{"steps": 2, "batch_size": 2, "micro_batch": 2, "log_every": 1, "eval_every": 1, "sample_tokens": 3}
            | {"eval_stories": 3, "sample_prompts": ("The",), "device": "cpu"}
            | changes
        ),
    )


def test_prepare_warns_and_records(lossy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    share = read_meta(lossy_data).lost_text
    assert 0.1 < share < 1
    tokenizer = str(lossy_data / "tokenizer.json")
    report = prepare("sample", tmp_path / "d", tokenizer=tokenizer, val_fraction=0.1, progress=False)
    assert report.meta.lost_text == share
    assert f"bits per byte are {describe_loss(share)} (" in caplog.text
    assert " comes back as " in caplog.text


def test_honest_data_are_as_before(sample_data: Path) -> None:
    assert "lost_text" not in json.loads((sample_data / "meta.json").read_text())
    assert read_meta(sample_data).lost_text == 0


def test_an_interrupted_prepare_measures_the_same(
    lossy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = str(lossy_data / "tokenizer.json")
    stories = list(iter_stories("sample"))
    for name, half in (("train", stories[80:]), ("val", stories[:80])):
        (tmp_path / f"{name}.txt").write_text(f"\n{END}\n".join(half), encoding="utf-8")
    arguments = {"val": str(tmp_path / "val.txt"), "tokenizer": tokenizer, "progress": False}
    whole = prepare(tmp_path / "train.txt", tmp_path / "whole", **arguments).meta
    save = StagingDir.save

    def stop_after_validation(self: StagingDir, **options: bool) -> None:
        save(self, **options)
        if self.journal.stage == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagingDir, "save", stop_after_validation)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "train.txt", tmp_path / "again", **arguments)
    assert prepare(tmp_path / "train.txt", tmp_path / "again", **arguments).meta == whole
    assert whole.lost_text > 0.1


def test_training_marks_every_number(
    lossy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    titles: list[str] = []
    monkeypatch.setattr("tinystories.train.recording.recorder.plot_curves", lambda *words: titles.append(words[-1]))
    report = train(config_for(lossy_data), tmp_path / "run")
    share = read_meta(lossy_data).lost_text
    assert report is not None
    assert report.lost_text == share
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "evaluated" in record]
    assert len(evaluations) == 2
    assert {record["val_lost_text"] for record in evaluations} == {share}
    assert all(NOTE in title for title in titles)
    assert len(titles) == 2
    numbers = [line for line in caplog.messages if "bits per byte" in line or "bits/byte" in line]
    assert len(numbers) >= 4
    assert all("not comparable" in line for line in numbers)
    assert (tmp_path / "run" / "samples.md").read_text().count(NOTE) == 2
    assert checkpoint.read_model(tmp_path / "run").provenance["val_lost_text"] == share
    card = build_model_card(ModelBundle.read(tmp_path / "run"))
    assert NOTE in card
    assert "can be compared" not in card


def test_eval_marks_its_number(lossy_data: Path, tmp_path: Path) -> None:
    train(config_for(lossy_data), tmp_path / "run")
    (tmp_path / "stories.txt").write_text(f"\n{END}\n".join(list(iter_stories("sample"))[:9]), encoding="utf-8")
    for data in (lossy_data, tmp_path / "stories.txt"):
        words = ["eval", str(tmp_path / "run"), "--data", str(data), "--engine", "cpu"]
        assert NOTE in CliRunner().invoke(cli, words, standalone_mode=False).output
        result = json.loads(CliRunner().invoke(cli, [*words, "--json"], standalone_mode=False).stdout)
        assert 0.1 < result["lost_text"] < 1


def test_an_honest_number_is_not_marked(sample_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = train(config_for(sample_data), tmp_path / "run")
    assert report is not None
    assert report.lost_text == 0
    assert "bits per byte on" in caplog.text
    assert "comparable" not in caplog.text
    assert "lost_text" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "val_lost_text" not in checkpoint.read_model(tmp_path / "run").provenance
    assert "can be compared" in build_model_card(ModelBundle.read(tmp_path / "run"))


def test_sweeps_mark_their_trials(lossy_data: Path, tmp_path: Path) -> None:
    train(config_for(lossy_data), trial_dir(tmp_path, 0))
    result = TrialResult(0, {"train.steps": 2}, read_outcome(trial_dir(tmp_path, 0)))
    assert NOTE in describe_result(result)
    assert f"trial 0: {NOTE}" in format_table([result], ["train.steps"])
