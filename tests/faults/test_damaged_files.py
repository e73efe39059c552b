"""Damaged and hostile files of data directories, runs and models are one line that names the file."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinystories import checkpoint
from tinystories.cli import main
from tinystories.cli.train.train import is_finished
from tinystories.config import Config
from tinystories.config_file import read_toml
from tinystories.data import encoder
from tinystories.data.dataset import open_split, read_meta
from tinystories.data.loader import PackedRows
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats import exports
from tinystories.formats.bundle import ModelBundle
from tinystories.sweep.trial import read_records as read_trial_records
from tinystories.train.recording.metrics import Metrics
from tinystories.train.recording.side_work import SideWork
from tinystories.train.run import train
from tinystories.train.state import read_train_state
from tinystories.weights.safetensors_file import SafetensorsFile


def run_command(words: list[str]) -> int:
    """Run the command line; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(sample_data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run_dir(config: Config, tmp_path: Path) -> Path:
    train(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [(0, 0, 5), (1, 0, 0), (-2, 0, 2**63), (3, 1, 0), (5, 1, 2**62)],
    ids=["first not 0", "no token", "beyond the end", "bytes shrink", "bytes grow and shrink"],
)
def test_a_forged_index(data: Path, row: int, column: int, value: int) -> None:
    """The case that was found crashed the process: the last row was right, those before it were not."""
    index = np.fromfile(data / "train.idx", "<u8").reshape(-1, 2)
    index[row, column] = value
    index.tofile(data / "train.idx")
    with pytest.raises(UserError, match=r"train\.idx is damaged; remove"):
        open_split(data, "train")
    open_split(data, "val")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": ' * 50_000, "[1]", '{"format": 1}'])
def test_a_hostile_meta_json(data: Path, content: str) -> None:
    (data / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json (cannot be read:|is invalid|must hold)"):
        read_meta(data)


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 1, "loss": "', b"[1]", b'{"tokens": 5}', b'{"step": 1.5}', b"\xff", b"[" * 9999],
    ids=["cut", "no object", "no step", "step is no integer", "not UTF-8", "nesting"],
)
def test_a_damaged_metrics_file(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "tokens": 2}\n' + damage + b"\n")
    for read in (lambda: Metrics(tmp_path, 10**6, SideWork()), lambda: read_trial_records(tmp_path)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
            read()
    with pytest.raises(UserError, match="line 2"):
        is_finished(tmp_path)
    path.write_bytes(b'{"step": 1, "tokens": 2}\n' + damage)
    assert read_trial_records(tmp_path) == [{"step": 1, "tokens": 2}], "a trial may be writing its last line"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 1.5),
        ("step", -1),
        ("tokens", "5"),
        ("micro_batch", None),
        ("seconds", [1]),
        ("best_bits_per_byte", "low"),
        ("best_bits_per_byte", float("nan")),
        ("recent_nats", float("inf")),
        ("data_sha256", 5),
        ("data_dir", 5),
        ("unknown", 1),
    ],
)
def test_a_damaged_clock(name: str, value: Any, run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step-0000004"
    path = folder / "state" / "clock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"clock\.json: .*{name}"):
        read_train_state(folder)


def test_provenance_that_is_no_object(run_dir: Path) -> None:
    path = run_dir / "config.json"
    for value in (5, "a", [1]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": value}))
        with pytest.raises(UserError, match=r"config\.json: \[provenance\] must be an object"):
            checkpoint.read_model(run_dir)


def test_weights_that_are_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            SafetensorsFile(path)
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "none")


def test_a_dtype_is_quoted(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "\x1b[2J" + "x" * 999, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="unsupported dtype") as caught:
        SafetensorsFile(tmp_path / "a")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 100


def test_settings_without_an_end() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("needs /dev/zero")
    with pytest.raises(UserError, match="config /dev/zero cannot be read: it is too large"):
        read_toml("/dev/zero")


@pytest.mark.parametrize("problem", ["a byte is missing", "no type"])
def test_a_tokenizer_that_the_fast_encoder_refuses(problem: str, sample_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    values = json.loads((sample_data / "tokenizer.json").read_text())
    if problem == "no type":
        del values["model"]["type"]
    else:
        ids = values["model"]["vocab"]
        ids["\u0120\u0120\u0120never"] = ids.pop("#")
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    reason = encoder.make_gigatoken_encoder(tokenizer)
    assert isinstance(reason, str)
    assert reason.isprintable()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_an_export_of_two_files_is_written_whole_or_not_at_all(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = ModelBundle.read(checkpoint.BUNDLED_MODEL), tmp_path / "a.gguf"
    plain, moved = exports.atomic_replace, []

    def move_one(source: Path, target: Path) -> None:
        if moved:
            raise error
        moved.append(target)
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(exports, "atomic_replace", move_one)
        with pytest.raises((UserError, KeyboardInterrupt)):
            exports.export(model, "gguf", out)
    assert len(moved) == 1
    assert os.listdir(tmp_path) == []
    exports.export(model, "gguf", out)


@pytest.mark.parametrize("splits", [1.5, "a", None, [], {"train": 0.5, "val": []}, {"train": "x"}])
def test_forged_splits_in_meta_json(data: Path, splits: object) -> None:
    """The case that was found: a number where the table of a split should be."""
    values = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(values | {"splits": splits}))
    with pytest.raises(UserError, match=r"meta\.json"):
        read_meta(data)


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_not_a_file(data: Path, name: str, kind: str) -> None:
    """A named pipe would block for ever, and /dev/zero would fill the memory."""
    (data / name).unlink()
    if kind == "fifo":
        os.mkfifo(data / name)
    else:
        (data / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        read_meta(data) if name == "meta.json" else Tokenizer.load(data / name)


@pytest.mark.parametrize("version", ["a\nb", "\x1b[31m", "x" * 500, None, {"a": [1]}])
def test_a_forged_version_is_one_line(data: Path, version: object, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(values | {"format": version}))
    assert run_command(["info", str(data)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.removesuffix("\n").isprintable()
    assert len(message) < len(str(data)) + 300


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred", "a\x00b", "\u202egnp", "a\r\nb"])
def test_a_user_error_is_one_line(text: str) -> None:
    """The case that was found: a name in the header of a weights file, in an error that Python code receives."""
    message = str(UserError(f"model.safetensors is damaged ({text})"))
    assert message.isprintable()
    assert message.startswith("model.safetensors is damaged (")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "tab\tbed"])
def test_a_file_name_with_control_characters_is_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a message quotes, also names that users give, it is printed as one line."""
    for command in (
        ["info", name],
        ["prepare", name, "--out", "x"],
        ["train", "--config", name],
        ["info", "--config", name],
    ):
        assert run_command([word if word != name else str(tmp_path / name) for word in command]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert message.removesuffix("\n").isprintable()


def test_a_model_card_in_another_encoding(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "README.md").write_bytes("# Ein Märchen\n".encode("latin-1"))
    assert run_command(["info", str(run_dir), "--card"]) == 0
    assert "Ein M" in capsys.readouterr().out


@pytest.mark.parametrize("position", [1, 2, -2])
def test_an_id_outside_the_vocabulary(data: Path, position: int) -> None:
    """The case that was found: PyTorch's IndexError; on CUDA it would have ended the process."""
    ids = np.fromfile(data / "train.bin", "<u2")
    ids[position] = 2314
    ids.tofile(data / "train.bin")
    rows = PackedRows(data, "train", 64, seed=1)
    with pytest.raises(UserError, match=r"train\.bin is damaged: it has id 2314, but the vocabulary has \d+; prepare"):
        rows.get_rows(np.arange(rows.n_rows))


def test_training_on_ids_outside_the_vocabulary(config: Config, data: Path, tmp_path: Path) -> None:
    ids = np.fromfile(data / "train.bin", "<u2")
    ids[ids != read_meta(data).end_id] = 2314
    ids.tofile(data / "train.bin")
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(data)))
    with pytest.raises(UserError, match=r"train\.bin is damaged: it has id 2314"):
        train(settings, tmp_path / "run")


@pytest.mark.parametrize("prefix", ["a\nb", "longer than any token"])
def test_a_panic_of_the_tokenizers_library(data: Path, prefix: str) -> None:
    """The case that was found: its Rust code panics, which is no `Exception` in Python."""
    text = json.loads((data / "tokenizer.json").read_text())
    text["model"]["continuing_subword_prefix"] = prefix
    (data / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a Hugging Face tokenizer: range end index"):
        Tokenizer.load(data)


class PanicException(BaseException):
    """As pyo3 names what it raises."""


@pytest.mark.parametrize("method", ["encode", "encode_batch", "decode"])
def test_a_panic_while_text_is_encoded(data: Path, method: str) -> None:
    class Backend:
        def panic(self, *_: object, **__: object) -> None:
            raise PanicException("index out of bounds")

        encode = encode_batch_fast = decode = panic

    tokenizer = Tokenizer.load(data)
    tokenizer.is_lossless = False  # type: ignore[misc]  # else decoding does not need the library
    tokenizer._backend = Backend()
    with pytest.raises(UserError, match=r"tokenizer\.json is not a valid tokenizer: index out of bounds"):
        getattr(tokenizer, method)("ab" if method == "encode" else ["ab"] if method == "encode_batch" else [1])


@pytest.mark.parametrize("depth", [60, 400, 900])
@pytest.mark.parametrize("flags", [[], ["--json"], ["--card"]])
def test_deeply_nested_provenance(
    run_dir: Path, depth: int, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The case that was found: JSON that Python can just parse, but not print."""
    config = json.loads((run_dir / "config.json").read_text())
    config["provenance"] |= {"name": "NESTED"}
    (run_dir / "config.json").write_text(json.dumps(config).replace('"NESTED"', "[" * depth + "]" * depth))
    assert run_command(["info", str(run_dir), *flags]) == 2
    assert "config.json has lists or objects nested more than 50 deep" in capsys.readouterr().err


def test_control_characters_in_provenance(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config["provenance"] |= {"name": "\x1b[31mred", "more": ["\x1b[0m", {"a": "\x07"}]}
    (run_dir / "config.json").write_text(json.dumps(config))
    assert run_command(["info", str(run_dir)]) == 0
    assert "\x1b" not in (shown := capsys.readouterr().out)
    assert "\x07" not in shown
