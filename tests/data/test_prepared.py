"""Opening prepared folders: damage is detected and the file is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinystories.data.dataset import open_split, read_meta
from tinystories.errors import UserError


@pytest.fixture
def folder(sample_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample_data, tmp_path / "data"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    edit(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_tokens_are_mapped_and_read_only(folder: Path) -> None:
    tokens, index = open_split(folder, "train")
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, index.dtype) == (np.dtype("<u2"), np.dtype("<u8"))
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("data", [b"", None])
def test_cut_or_grown_files_are_named(folder: Path, name: str, data: bytes | None) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2] if data is None else path.read_bytes() + b"\0\0")
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes .*meta\.json says \d+.*prepare it again"):
        open_split(folder, "train")
    open_split(folder, "val")  # the other split is whole


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
        open_split(folder, "train")


def test_an_index_of_other_data_is_noticed(folder: Path) -> None:
    index = np.fromfile(folder / "train.idx", "<u8")
    index[-1] += 1
    index.tofile(folder / "train.idx")
    with pytest.raises(UserError, match="does not match meta"):
        open_split(folder, "train")


def test_a_folder_without_meta_is_no_prepared_data(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no prepared data.*tinystories prepare"):
            read_meta(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\x00\xff", '{"format": 1, "splits": {}}'])
def test_garbled_meta_is_named(folder: Path, text: str) -> None:
    (folder / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"meta\.json") as caught:
        read_meta(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda meta: meta.update(format=2), "format 2"),
        (lambda meta: meta.pop("tokenizer_sha256"), "tokenizer_sha256"),
        (lambda meta: meta.update(colour="red"), "colour"),
        (lambda meta: meta["splits"].pop("val"), "val"),
        (lambda meta: meta["splits"]["train"].update(tokens="many"), "tokens='many' must be of type int"),
        (lambda meta: meta.update(vocab_size="400"), "vocab_size"),
        (lambda meta: meta.update(dtype="float32"), "dtype"),
        (lambda meta: meta["splits"]["train"].update(stories=-5), "stories"),
    ],
)
def test_meta_of_another_shape_is_refused(folder: Path, edit: Callable[[dict[str, Any]], object], named: str) -> None:
    change(folder, edit)
    with pytest.raises(UserError, match=r"meta\.json") as caught:
        read_meta(folder)
    assert named in str(caught.value)
