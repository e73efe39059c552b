"""`prepare`: the layout on disk, held-out stories, running it again, and foreign output folders."""

import dataclasses
import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from story_files import write_jsonl, write_txt

from tinystories import files
from tinystories.data.build_tokenizer import train_bpe
from tinystories.data.dataset import open_split, read_meta
from tinystories.data.prepare import PrepareReport, prepare
from tinystories.data.source import reader
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError

pytestmark = pytest.mark.extended


def texts_of(out: Path, split: str) -> list[str]:
    """Decode the stories of a split via the index and the tokenizer; also check the layout."""
    tokenizer = Tokenizer.load(out)
    tokens, index = open_split(out, split)
    texts = []
    for (start, before), (end, after) in itertools.pairwise(index.tolist()):
        assert tokens[start] == tokenizer.end_id
        assert tokenizer.end_id not in tokens[start + 1 : end]
        texts.append(tokenizer.decode(tokens[start + 1 : end].tolist()))
        assert len(texts[-1].encode()) == after - before
    assert index[0].tolist() == [0, 0]
    assert tokens[-1] == tokenizer.end_id
    assert index[-1, 0] == len(tokens) - 1
    return texts


@pytest.fixture
def source(tmp_path: Path, many: list[str]) -> Path:
    return write_txt(tmp_path / "many.txt", many)


def run(source: Path | list[Path] | str, out: Path, **options: object) -> PrepareReport:
    return prepare(source, out, **{"tokenizer": "bpe:300", "progress": False, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_story_is_there_in_order(source: Path, many: list[str], tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", val_fraction=0.2)
    train, val = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "val")
    assert 30 < len(val) < 90
    assert train == [story for story in many if story not in val]
    assert val == [story for story in many if story in val]
    assert not report.up_to_date
    assert not (tmp_path / "out.draft").exists()


def test_meta_says_what_is_there(source: Path, many: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(source, out, val_fraction=0.2)
    meta = read_meta(out)
    assert meta == report.meta
    assert set(contents(out)) == {"train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json", "meta.json"}
    tokenizer = Tokenizer.load(out)
    assert (meta.vocab_size, meta.end_id, meta.tokenizer_sha256) == (300, tokenizer.end_id, tokenizer.sha256)
    assert (meta.tokenizer, meta.source, meta.val_source) == ("bpe:300", str(source), "")
    for split in ("train", "val"):
        texts, sizes = texts_of(out, split), meta.splits[split]
        assert sizes.stories == len(texts)
        assert sizes.bytes == sum(len(text.encode()) for text in texts)
        assert sizes.tokens == len(texts) + 1 + sum(len(tokenizer.encode(text)) for text in texts)
        assert sizes.sha256 == hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest()
        assert (out / f"{split}.bin").stat().st_size == 2 * sizes.tokens
    assert sum(sizes.stories for sizes in meta.splits.values()) == len(many)


def test_duplicates_are_dropped_wherever_they_are(tmp_path: Path, many: list[str]) -> None:
    twice = [*many, *many[:100], "  " + many[5] + "\n"]
    random.Random(1).shuffle(twice)
    report = run(write_txt(tmp_path / "a.txt", twice), tmp_path / "out", val_fraction=0.2)
    texts = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "val")
    assert sorted(texts) == sorted(many)
    assert report.meta.duplicates == 101
    report = run(tmp_path / "a.txt", tmp_path / "kept", val_fraction=0.2, keep_duplicates=True)
    texts = texts_of(tmp_path / "kept", "train") + texts_of(tmp_path / "kept", "val")
    assert len(texts) == 401
    assert set(texts_of(tmp_path / "kept", "val")) == set(texts_of(tmp_path / "out", "val"))


def test_a_given_validation_set_is_whole_and_apart(tmp_path: Path, many: list[str]) -> None:
    train = write_txt(tmp_path / "train.txt", many)
    val = write_txt(tmp_path / "val.txt", ["New one.", *many[::10], many[0]])
    report = run(train, tmp_path / "out", val=val)
    assert texts_of(tmp_path / "out", "val") == ["New one.", *many[::10], many[0]]
    assert texts_of(tmp_path / "out", "train") == [story for n, story in enumerate(many) if n % 10]
    assert (report.meta.also_in_val, report.meta.duplicates) == (30, 0)


def test_order_and_packaging_do_not_move_a_story_to_the_other_side(tmp_path: Path, many: list[str]) -> None:
    run(write_txt(tmp_path / "a.txt", many), tmp_path / "a", val_fraction=0.2)
    run(write_jsonl(tmp_path / "b.jsonl", many[::-1]), tmp_path / "b", val_fraction=0.2)
    assert texts_of(tmp_path / "a", "val") == texts_of(tmp_path / "b", "val")[::-1]


def test_several_files_and_folders_are_read_in_order(tmp_path: Path, many: list[str]) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    write_txt(tmp_path / "folder" / "b.txt", many[100:150])
    write_txt(tmp_path / "folder" / "a.TXT", many[50:100])
    write_txt(tmp_path / "folder" / "deep" / "c.txt", many[150:])
    (tmp_path / "folder" / "notes.md").write_text("not a story")
    first = write_txt(tmp_path / "z.txt", many[:50])
    run([first, tmp_path / "folder"], tmp_path / "out", val_fraction=0.0)
    assert texts_of(tmp_path / "out", "train") == many


def test_the_batch_size_does_not_show(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "a")
    monkeypatch.setattr(reader, "BATCH_BYTES", 500)
    run(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_held_out_stories_teach_the_tokenizer_nothing(tmp_path: Path, many: list[str]) -> None:
    run(write_txt(tmp_path / "a.txt", many), tmp_path / "out", val_fraction=0.2)
    learned = train_bpe(300, texts_of(tmp_path / "out", "train"))
    assert Tokenizer.load(tmp_path / "out").json_text == learned.json_text
    assert learned.json_text != train_bpe(300, many).json_text
    run(tmp_path / "a.txt", tmp_path / "given", val=write_txt(tmp_path / "val.txt", ["zzz"]))
    assert Tokenizer.load(tmp_path / "given").json_text == train_bpe(300, many).json_text


def test_end_in_a_story_is_text(tmp_path: Path) -> None:
    odd = [f"She wrote {END} on the wall.", END, "Plain."]
    run(write_jsonl(tmp_path / "a.jsonl", odd), tmp_path / "out", val_fraction=0.0)
    assert texts_of(tmp_path / "out", "train") == odd


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path, many: list[str], bpe: Tokenizer) -> None:
    parts = json.loads(bpe.json_text)
    vocab = parts["model"]["vocab"]
    vocab.update({f"unused{n}": n for n in range(400, 70_000)})
    vocab["unused"], vocab["c"] = vocab["c"], 70_000
    (tmp_path / "big.json").write_text(json.dumps(parts))
    source = write_txt(tmp_path / "a.txt", many)
    report = run(source, tmp_path / "out", tokenizer=str(tmp_path / "big.json"), val_fraction=0.0)
    tokens, _ = open_split(tmp_path / "out", "train")
    assert report.meta.dtype == "uint32"
    assert tokens.dtype == np.dtype("<u4")
    assert tokens.max() == 70_000
    assert texts_of(tmp_path / "out", "train") == many


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_width_changes_where_16_bits_end(tmp_path: Path, bpe: Tokenizer, size: int, dtype: str) -> None:
    parts = json.loads(bpe.json_text)
    parts["model"]["vocab"].update({f"unused{n}": n for n in range(400, size)})
    (tmp_path / "big.json").write_text(json.dumps(parts))
    source = write_txt(tmp_path / "a.txt", ["One."])
    assert run(source, tmp_path / "out", tokenizer=str(tmp_path / "big.json")).meta.dtype == dtype


def test_the_sample_keeps_some_stories_to_validate_on(tmp_path: Path) -> None:
    report = run("sample", tmp_path / "out")
    everything = list(iter_stories("sample"))
    assert report.meta.splits["val"].stories >= 8
    assert sum(split.stories for split in report.meta.splits.values()) == len(everything) >= 150


def test_a_second_run_has_nothing_to_do(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = run(source, tmp_path / "out")
    assert second.up_to_date
    assert second.meta == first.meta
    assert second.seconds < 1
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_moved_copy_of_a_file_is_the_same_request(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / source.name
    copy.write_bytes(source.read_bytes())
    assert run(copy, tmp_path / "out").up_to_date


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer": "bpe:301"}, "tokenizer='bpe:300'"),
        ({"keep_duplicates": True}, "keep_duplicates=False"),
        ({"errors": "replace"}, "errors='strict'"),
        ({"val": "sample"}, "val_source=''"),
        ({"val_fraction": 0.5}, "different"),
    ],
)
def test_data_of_another_request_is_left_alone(
    source: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="another --out") as caught:
        run(source, tmp_path / "out", **change)
    assert named in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_changed_source_is_noticed(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    data = bytearray(source.read_bytes())
    data[7000] ^= 1
    source.write_bytes(data)
    with pytest.raises(UserError, match="different contents"):
        run(source, tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"me")
    with pytest.raises(UserError, match="not empty"):
        run(source, out)
    assert contents(out) == {"photo.jpg": b"me"}
    assert not (tmp_path / "precious.draft").exists()


def test_a_foreign_folder_in_the_drafts_place_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.draft").mkdir()
    (tmp_path / "out.draft" / "novel.txt").write_text("It was a dark and stormy night")
    with pytest.raises(UserError, match=r"out\.draft exists"):
        run(source, tmp_path / "out")
    assert contents(tmp_path / "out.draft") == {"novel.txt": b"It was a dark and stormy night"}


def test_an_output_that_is_a_file_is_refused(source: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        run(source, source)


def test_an_empty_folder_will_do(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out")
    assert read_meta(tmp_path / "out").splits["train"].stories > 0


def test_a_source_without_stories_is_refused(tmp_path: Path) -> None:
    blank = write_txt(tmp_path / "blank.txt", ["", " \n"])
    one = write_txt(tmp_path / "one.txt", ["One."])
    with pytest.raises(UserError, match=r"blank\.txt: no stories .*to train on"):
        run(blank, tmp_path / "out")
    with pytest.raises(UserError, match=r"blank\.txt: no stories to validate on"):
        run(one, tmp_path / "out", val=blank)
    with pytest.raises(UserError, match=r"one\.txt: no stories .*to train on"):
        run(one, tmp_path / "out", val=one)
    assert not (tmp_path / "out").exists()


def test_a_split_may_have_no_validation_stories(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = run(write_txt(tmp_path / "one.txt", ["One."]), tmp_path / "out", val_fraction=0.0)
    tokens, index = open_split(tmp_path / "out", "val")
    assert tokens.tolist() == [report.meta.end_id]
    assert index.tolist() == [[0, 0]]
    assert "--val" in caplog.text


def test_two_runs_at_once_do_not_mix(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "out.draft").mkdir()
    with (
        files.acquire_lock(tmp_path / "out.draft" / "lock"),
        pytest.raises(UserError, match="in use by another prepare"),
    ):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out")


def test_an_unwritable_place_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        run(source, source / "out")  # below a file

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"out\.draft cannot be written: Permission denied"):
        run(source, tmp_path / "out")


def test_the_real_stories_are_counted(real_train: Path, gpt2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = prepare(real_train, tmp_path / "out", val=real_train.with_name("valid.txt"), progress=False)
    assert [split.stories for split in report.meta.splits.values()] == [14_022, 4_000]
    tokens, index = open_split(tmp_path / "out", "val")
    last = list(iter_stories(real_train.with_name("valid.txt")))[-1]
    assert tokens[int(index[-2, 0]) + 1 : int(index[-1, 0])].tolist() == gpt2_tokenizer.encode(last)


def test_the_report_can_be_printed_as_json(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out")
    assert json.loads(json.dumps(dataclasses.asdict(report), default=str))["meta"]["splits"]["train"]["stories"] > 0
