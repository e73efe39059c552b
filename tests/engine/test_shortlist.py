"""A head of some rows gives the logits of the whole one, and lists that are not whole are refused."""

import collections
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from engines import opened, saved

from tinystories import checkpoint
from tinystories.config import SamplingConfig
from tinystories.data.dataset import open_split
from tinystories.data.prepare import prepare
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu import shortlist
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.select import load_engine
from tinystories.errors import UserError
from tinystories.generate.batching import Request, generate_all
from tinystories.model import GPT
from tinystories.weights.load import Precision

LIST = np.sort(np.random.default_rng(2).permutation(400)[:37])  # ends within a block, and within four rows
IDS = np.random.default_rng(1).integers(0, 400, 9).tolist()


@pytest.fixture
def folder(build: Callable[..., GPT], sample_data: Path, tmp_path: Path) -> Path:
    return saved(tmp_path / "model", build(vocab_size=400), sample_data)


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize(
    "shape",
    [{"tied": True}, {"tied": False}, {"tied": True, "architecture": "classic", "n_embd": 40}],
    ids=["tied", "untied", "classic"],
)
def test_logits_of_listed_ids_are_those_of_the_whole_head(
    build: Callable[..., GPT], sample_data: Path, tmp_path: Path, shape: dict[str, Any], precision: Precision
) -> None:
    """Bit for bit, after prompts and steps, in one stream and in several; -inf elsewhere."""
    folder = saved(tmp_path / "model", build(vocab_size=400, **shape), sample_data)
    whole, short = (opened(folder, precision, n_slots=3, shortlist_ids=ids) for ids in (None, LIST))
    outside = np.setdiff1d(np.arange(400), LIST)
    for ask in (
        lambda engine: np.stack([engine.prefill(slot, IDS[slot:]) for slot in range(3)]),
        lambda engine: engine.step([2, 0, 1], [399, 0, 7]),
        lambda engine: engine.step([1], [LIST[0]]),
    ):
        expected, found = ask(whole), ask(short)
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert (found[:, LIST] == expected[:, LIST]).all()
        assert (found[:, outside] == -np.inf).all()


@pytest.mark.parametrize("precision", get_args(Precision))
def test_greedy_ids_are_the_same_until_one_is_not_listed(folder: Path, sample_data: Path, precision: Precision) -> None:
    def ids(listed: Any) -> tuple[int, ...]:
        request = Request(prompt="Once", settings=SamplingConfig(temperature=0), max_tokens=60, ignore_end=True)
        engine = opened(folder, precision, shortlist_ids=listed)
        return generate_all(engine, Tokenizer.load(sample_data), [request])[0].ids

    first = ids(None)
    used = np.union1d(first, LIST)
    assert len(used) < 400
    assert ids(used) == first
    at = first.index(first[20])
    without = ids(used[used != first[20]])
    assert without[:at] == first[:at]
    assert first[20] not in without


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 5.0}, {"top_p": 0.9}, {"top_k": 50}, {"repetition_penalty": 1.5}, {"min_p": 0.2}],
    ids=str,
)
def test_no_setting_draws_another_id(folder: Path, sample_data: Path, settings: dict[str, Any]) -> None:
    chosen = SamplingConfig(**{"temperature": 1.0, "min_p": 0.0} | settings)
    requests = [Request(settings=chosen, max_tokens=60, ignore_end=True, number=i) for i in range(4)]
    stories = generate_all(opened(folder, n_slots=4, shortlist_ids=LIST), Tokenizer.load(sample_data), requests)
    drawn = {token for story in stories for token in story.ids}
    assert len(drawn) > 5
    assert drawn <= set(LIST.tolist())


def test_a_shortlist_scores_nothing(folder: Path) -> None:
    with pytest.raises(UserError, match="score without --shortlist"):
        opened(folder, shortlist_ids=LIST).logprobs([[1, 2]])


@pytest.mark.parametrize("n", [100, 180, 195])
def test_a_shortlist_has_the_most_frequent_ids_and_reports_the_rest(folder: Path, sample_data: Path, n: int) -> None:
    files = checkpoint.read_model(folder)
    ids, share = shortlist.most_frequent_ids(files, sample_data, n)
    end_id = files.tokenizer().end_id
    train, _ = open_split(sample_data, "train")
    counts = collections.Counter(train.tolist())
    ranked = sorted(counts.keys() - {end_id}, key=lambda token: (-counts[token], token))
    assert ids.tolist() == sorted([end_id, *ranked[: n - 1]])
    assert share == pytest.approx(sum(counts[token] for token in ids.tolist()) / len(train))
    val, index = open_split(sample_data, "val")
    stories = [set(val[a:b].tolist()) for (a, _), (b, _) in itertools.pairwise(index)]
    tokens_lost, stories_lost = shortlist.coverage_loss(files, sample_data, ids)
    assert tokens_lost == pytest.approx(np.isin(val, ids, invert=True).mean())
    assert tokens_lost > 0
    assert stories_lost == pytest.approx(np.mean([not story <= set(ids.tolist()) for story in stories]))


def test_the_end_is_listed_however_rare(folder: Path, sample_data: Path) -> None:
    files = checkpoint.read_model(folder)
    assert files.tokenizer().end_id in shortlist.most_frequent_ids(files, sample_data, 2)[0]


@pytest.mark.parametrize("n", [-5, 0, 1, 206, 50_000])
def test_a_list_has_ids_that_occur(folder: Path, sample_data: Path, n: int) -> None:
    with pytest.raises(UserError, match=r"--shortlist from 2 to 205$"):
        shortlist.most_frequent_ids(checkpoint.read_model(folder), sample_data, n)


def test_data_of_others_are_refused(folder: Path, sample_data: Path, tmp_path: Path) -> None:
    files = checkpoint.read_model(folder)
    with pytest.raises(UserError, match="holds no prepared data"):
        shortlist.most_frequent_ids(files, tmp_path, 100)
    prepare("sample", tmp_path / "other", tokenizer="bpe:300", val_fraction=0.05, progress=False)
    with pytest.raises(UserError, match=r"different tokenizer.*--tokenizer"):
        shortlist.most_frequent_ids(files, tmp_path / "other", 100)
    shutil.copytree(sample_data, tmp_path / "damaged")
    for split in ("train", "val"):
        tokens = np.fromfile(sample_data / f"{split}.bin", dtype="<u2")
        tokens[5] = 400
        tokens.tofile(tmp_path / "damaged" / f"{split}.bin")
    with pytest.raises(UserError, match=r"train\.bin is damaged: .*id 400"):
        shortlist.most_frequent_ids(files, tmp_path / "damaged", 100)
    with pytest.raises(UserError, match=r"val\.bin is damaged: .*id 400"):
        shortlist.coverage_loss(files, tmp_path / "damaged", LIST)


def test_a_list_is_read_as_it_was_written(folder: Path, sample_data: Path) -> None:
    files = checkpoint.read_model(folder)
    ids, _ = shortlist.most_frequent_ids(files, sample_data, 100)
    assert shortlist.write_shortlist(files, LIST).name == "shortlist.json"
    shortlist.write_shortlist(files, ids)
    assert (shortlist.read_shortlist(files) == ids).all()
    assert sorted(path.name for path in folder.iterdir() if "shortlist" in path.name) == ["shortlist.json"]


def test_a_folder_that_cannot_be_written_to_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"shortlist\.json could not be written: Permission denied"):
        shortlist.write_shortlist(checkpoint.read_model(folder), LIST)


def changed(facts: dict[str, Any], **changes: Any) -> str:
    """The text of a list whose own checksum is right."""
    new = {name: value for name, value in (facts | changes).items() if name != "sha256"}
    return json.dumps(new | {"sha256": shortlist.compute_digest(new)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "cannot be read"),
        (lambda facts: json.dumps(facts)[:-9], "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\udcff", "cannot be read"),
        ("[1, 2]", "JSON object"),
        ("{}", "is damaged"),
        (lambda facts: json.dumps(facts | {"ids": facts["ids"][1:]}), "is damaged"),
        (lambda facts: changed(facts, format=2), "is damaged"),
        (lambda facts: changed(facts, tokenizer_sha256="0" * 64), "different vocabulary"),
        (lambda facts: changed(facts, vocab_size=401), "different vocabulary"),
        (lambda facts: changed(facts, ids=None), "ascending"),
        (lambda facts: changed(facts, ids=5), "ascending"),
        (lambda facts: changed(facts, ids=[]), "ascending"),
        (lambda facts: changed(facts, ids=[*facts["ids"], 400]), "ascending"),
        (lambda facts: changed(facts, ids=[-1, *facts["ids"]]), "ascending"),
        (lambda facts: changed(facts, ids=[*facts["ids"], 10**30]), "ascending"),
        (lambda facts: changed(facts, ids=[float(token) for token in facts["ids"]]), "ascending"),
        (lambda facts: changed(facts, ids=[[0], *facts["ids"]]), "ascending"),
        (lambda facts: changed(facts, ids=facts["ids"][::-1]), "ascending"),
        (lambda facts: changed(facts, ids=[facts["ids"][0], *facts["ids"]]), "ascending"),
        (lambda facts: changed(facts, ids=facts["ids"][:-1]), "ascending"),
    ],
)
def test_lists_that_are_not_whole_are_refused(
    folder: Path, sample_data: Path, change: str | Callable[[dict[str, Any]], str], message: str
) -> None:
    files = checkpoint.read_model(folder)
    assert files.tokenizer().end_id == 399
    path = shortlist.write_shortlist(files, shortlist.most_frequent_ids(files, sample_data, 100)[0])
    text = change if isinstance(change, str) else change(json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as raised:
        shortlist.read_shortlist(files)
    assert "shortlist.json" in str(raised.value)


def test_an_engine_that_cannot_use_a_shortlist_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match="add --engine cpu"):
        EngineConfig(engine="torch", shortlist=True)
    with pytest.raises(UserError, match="add --engine cpu"):
        load_engine(folder, EngineConfig(device="cuda", shortlist=True))
    with pytest.raises(UserError, match="has no shortlist; make one with: tinystories quantize"):
        load_engine(folder, EngineConfig(engine="cpu", shortlist=True))
