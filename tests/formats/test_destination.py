"""Where exports and imports go: nothing is lost that was not asked for, and what goes wrong is one line."""

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from format_helpers import Build
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from tinystories import checkpoint
from tinystories.cli import cli, run
from tinystories.errors import UserError
from tinystories.files import atomic_directory
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.imports import import_model, import_to_directory
from tinystories.formats.registry import EXPORT_NAMES, FORMATS

FILES = [name for name in EXPORT_NAMES if name != "hf"]


@pytest.fixture
def model(portable: Build, tmp_path: Path) -> Path:
    portable("llama").write(tmp_path / "home" / "model")
    return tmp_path / "home" / "model"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("out", ["home/model", "home", "home/model/config.json", "link", "home/../home/model"])
def test_the_model_that_is_read_is_never_replaced(tmp_path: Path, model: Path, out: str) -> None:
    (tmp_path / "link").symlink_to(model)
    before = contents(tmp_path)
    for name in EXPORT_NAMES:
        with pytest.raises(UserError, match=r"is, contains, or is inside .*; choose another --out"):
            export(ModelBundle.read(model), name, tmp_path / out, force=True)
    with pytest.raises(UserError, match="is, contains, or is inside"):
        import_to_directory(str(model), tmp_path / out, force=True)
    assert contents(tmp_path) == before


def test_an_export_may_lie_beside_the_weights(model: Path) -> None:
    before = contents(model)
    made = export(ModelBundle.read(model), "onnx", model / "story.onnx").paths
    export(ModelBundle.read(model), "onnx", model.parent / "other" / "story.onnx")
    assert made == [model / "story.onnx", model / "story.onnx.tokenizer.json"]
    for path in made:
        path.unlink()
    assert contents(model) == before


@pytest.mark.parametrize("name", FILES)
def test_the_file_that_is_read_is_never_replaced(portable: Build, tmp_path: Path, name: str) -> None:
    (tmp_path / "one").mkdir()
    export(portable("llama"), name, tmp_path / "one" / "m.bin")
    for out in (tmp_path / "one" / "m.bin", tmp_path / "one"):
        with pytest.raises(UserError, match="is, contains, or is inside"):
            import_to_directory(str(tmp_path / "one" / "m.bin"), out, force=True)


def run_of(model: Path, folder: Path) -> None:
    ModelBundle.read(model).write(folder)
    (folder / "checkpoints").mkdir()


FULL = {
    "a thesis": lambda _, folder: (folder.mkdir(), (folder / "thesis.txt").write_text("long")),
    "a run": run_of,
    "a model and a note": lambda model, folder: (
        ModelBundle.read(model).write(folder),
        (folder / "note").write_text("mine"),
    ),
    "another config.json": lambda _, folder: (folder.mkdir(), (folder / "config.json").write_text('{"port": 80}')),
    "a link to a directory": lambda model, folder: folder.symlink_to(model),
    "a dangling link": lambda model, folder: folder.symlink_to(model / "nothing"),
    "a pipe": lambda _, folder: os.mkfifo(folder),
}


@pytest.mark.parametrize("kind", FULL)
def test_other_things_are_not_replaced_even_by_force(portable: Build, tmp_path: Path, model: Path, kind: str) -> None:
    FULL[kind](model, tmp_path / "out")
    before = contents(tmp_path)
    for force in (True, False):
        for name in EXPORT_NAMES:
            with pytest.raises(UserError, match=r"out is .*; choose another --out$"):
                export(
                    portable("qwen3" if name in ("hf", "gguf", "onnx") else "llama"),
                    name,
                    tmp_path / "out",
                    force=force,
                )
        with pytest.raises(UserError, match=r"out is .*; choose another --out$"):
            import_to_directory(str(tmp_path / "elsewhere"), tmp_path / "out", force=force)
    assert contents(tmp_path) == before


def test_a_directory_does_not_replace_a_file(portable: Build, tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").write_text("a thesis")
    with pytest.raises(UserError, match="is a file and cannot be replaced by a directory"):
        export(portable("llama"), "hf", tmp_path / "out", force=True)
    with pytest.raises(UserError, match="is a file and cannot be replaced by a directory"):
        import_to_directory(str(model), tmp_path / "out", force=True)
    assert (tmp_path / "out").read_text() == "a thesis"


@pytest.mark.parametrize("former", ["hf", "model", "empty"])
def test_an_earlier_export_or_import_is_replaced_by_force(
    portable: Build, tmp_path: Path, model: Path, former: str
) -> None:
    old = portable("qwen3")
    for name, act in (
        ("one", lambda out, force: export(ModelBundle.read(model), "hf", out, force=force)),
        ("two", lambda out, force: import_to_directory(str(model), out, force=force)),
    ):
        out = tmp_path / name / "out"
        if former == "hf":
            export(old, "hf", out)
        elif former == "model":
            old.write(out)
        else:
            out.mkdir(parents=True)
        with pytest.raises(UserError, match=r"exists; .*--force"):
            act(out, False)
        act(out, True)
        assert import_model(str(out)).config == portable("llama").config
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("out", [".", "", "/", "..", "a/.."])
@pytest.mark.parametrize("force", [True, False])
def test_an_output_path_without_a_name_is_refused(
    portable: Build, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, out: str, force: bool
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    before = contents(tmp_path)
    for name in EXPORT_NAMES:
        with pytest.raises(UserError, match="output path"):
            export(portable("llama"), name, Path(out), force=force)
    with pytest.raises(UserError, match="output path"):
        import_to_directory(str(model), Path(out), force=force)
    with pytest.raises(UserError, match="output path"), atomic_directory(Path(out)):
        pass
    assert contents(tmp_path) == before


UNWRITABLE = ["file/below", "/proc/nothing/x", "x" * 300, "/dev/full/x"]


@pytest.mark.parametrize("out", UNWRITABLE)
def test_places_that_cannot_be_written_are_one_line(portable: Build, tmp_path: Path, model: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    for name in EXPORT_NAMES:
        with pytest.raises(UserError, match="cannot be written: "):
            export(portable("llama"), name, tmp_path / out)
    with pytest.raises(UserError, match="cannot be written: "):
        import_to_directory(str(model), tmp_path / out)
    assert contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_numpy, "save_file", full)
    with pytest.raises(UserError, match=r"new cannot be written: .*No space left"):
        import_to_directory(str(model), tmp_path / "new")
    with pytest.raises(UserError, match=r"new cannot be written: .*No space left"):
        export(ModelBundle.read(model), "hf", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("source", ["home", "home/model", "home/model/model.safetensors"])
def test_a_source_without_read_permission_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """As for a user whom the owner has given no rights."""
    closed, plain = tmp_path / source, (Path.stat, Path.open, Path.iterdir)

    def guarded(method: Any) -> Any:
        def act(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path == closed or (path.is_relative_to(closed) and method is not plain[2]):
                raise PermissionError(13, "Permission denied", str(path))
            return method(path, *args, **kwargs)

        return act

    for name, method in zip(("stat", "open", "iterdir"), plain, strict=True):
        monkeypatch.setattr(Path, name, guarded(method))
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        import_to_directory(str(model), tmp_path / "out")
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        checkpoint.read_model(model)


@pytest.mark.parametrize(("name", "out"), [("gguf", "m.Modelfile"), ("gguf", "m.modelfile")])
def test_a_name_that_a_companion_has_is_refused(portable: Build, tmp_path: Path, name: str, out: str) -> None:
    with pytest.raises(UserError, match="name of a file that the export writes beside"):
        export(portable("llama"), name, tmp_path / out, force=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
def test_companions_in_the_way_are_found_before_the_work(
    portable: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    form = FORMATS[name]
    monkeypatch.setitem(FORMATS, name, dataclasses.replace(form, write=None))  # type: ignore[arg-type]
    for companion in form.sidecars(tmp_path / "m.bin"):
        companion.write_text("a poem")
        with pytest.raises(UserError, match=rf"{re.escape(companion.name)} exists; .*--force"):
            export(portable("llama"), name, tmp_path / "m.bin")
        assert companion.read_text() == "a poem"
        companion.unlink()


def test_exports_side_by_side_keep_their_companions_apart() -> None:
    files = [file for form in FORMATS.values() for file in form.sidecars(Path("out/m.x"))]
    assert len(set(files)) == len(files) == 4


def test_a_companion_that_is_not_written_anew_is_removed(
    portable: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an import would take the tokenizer of the export before."""
    form = FORMATS["llama2c"]

    def write(model: ModelBundle, path: Path, precision: str) -> Any:
        order = form.write(model, path, precision)
        form.sidecars(path)[1].unlink()
        return order

    export(portable("llama"), "llama2c", tmp_path / "m.bin")
    monkeypatch.setitem(FORMATS, "llama2c", dataclasses.replace(form, write=write))
    done = export(portable("llama"), "llama2c", tmp_path / "m.bin", force=True)
    assert [path.name for path in done.paths] == ["m.bin", "m.tokenizer.bin"]
    assert sorted(tmp_path.iterdir()) == done.paths


def test_precision_ignores_case(portable: Build, tmp_path: Path) -> None:
    export(portable("llama"), "gguf", tmp_path / "a.gguf", precision="Q8_0")
    export(portable("llama"), "gguf", tmp_path / "b.gguf", precision="q8_0")
    assert (tmp_path / "a.gguf").stat().st_size == (tmp_path / "b.gguf").stat().st_size


@pytest.mark.parametrize("name", ["gguf", "llama2c"])
def test_next_commands_can_be_pasted(name: str) -> None:
    hint = FORMATS[name].next_steps(Path("my models/it's.gguf"))
    words = shlex.split(hint.splitlines()[0])
    assert "my models/it's.gguf" in words


def test_the_next_command_of_an_import_can_be_pasted(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(cli, ["import", str(model), "--out", str(tmp_path / "my models")]) == 0
    told = capfd.readouterr().out.splitlines()[-1]
    assert shlex.split(told.removeprefix("next: "))[2] == str(tmp_path / "my models")


def test_the_current_directory_is_imported_under_its_name(
    portable: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(portable("llama"), "hf", tmp_path / "story")
    monkeypatch.chdir(tmp_path / "story")
    assert import_to_directory(".", tmp_path / "out").provenance["imported_from"] == "story"
    (tmp_path / "void").mkdir()
    monkeypatch.chdir(tmp_path / "void")
    with pytest.raises(UserError, match=r"void contains no model: .*config\.json .*GGUF"):
        import_to_directory(".", tmp_path / "more")


def test_a_tokenizer_path_that_does_not_exist_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer gpt3: no such file; .*tokenizer\.json.*gpt2") as caught:
        import_to_directory(str(model), tmp_path / "out", Path("gpt3"))
    assert "bpe" not in str(caught.value)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.bin")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        import_to_directory(str(tmp_path / "model.bin"), tmp_path / "out")
