"""Machine code made ahead of time: the best match is loaded, nothing else is; the same sources give the same bytes."""

import hashlib
import json
import logging
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run_python

from tinystories.engine.cpu import jit, objects, target
from tinystories.engine.cpu.compiler import Request
from tinystories.engine.cpu.target import LEVELS, X86_LEVELS, select_target
from tinystories.errors import UserError

X86 = "x86_64-unknown-linux-gnu"
BEST = select_target().best_level
linux_only = pytest.mark.skipif(objects.sys.platform != "linux" or BEST not in LEVELS, reason="objects are for Linux")
LOGITS = """
import hashlib, pathlib, sys, tinystories
from tinystories.engine.cpu import objects
objects.OBJECT_FOLDER = pathlib.Path(sys.argv[2])
engine = tinystories.load(precision=sys.argv[1], threads=1).engine
logits = [engine.prefill(0, [7 * i % 4096 for i in range(70)]), *(engine.step([0], [i]) for i in range(5))]
assert "numba" not in sys.modules
print(hashlib.sha256(b"".join(part.tobytes() for part in logits)).hexdigest())
print(tinystories.load(precision=sys.argv[1], threads=1).generate("One day", seed=3, max_tokens=30).ids)
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what other tests have read, and set no variable that selects a processor."""
    for name in (target.VARIABLE, *target.NUMBA_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for function in (objects.read_index, objects.read_objects):
        function.cache_clear()
    yield
    for function in (objects.read_index, objects.read_objects):
        function.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with objects of all levels that are no machine code: each names its level and entry point."""
    entries: dict[str, Any] = {}
    for level in LEVELS:
        parts = {name: f"{level} {name}".encode() for name in ("int8", "sample")}
        header = json.dumps({name: len(part) for name, part in parts.items()}).encode() + b"\n"
        content = lzma.compress(header + b"".join(parts.values()))
        (tmp_path / f"{level}.xz").write_bytes(content)
        entries[level] = {"sha256": hashlib.sha256(content).hexdigest(), "target": list(LEVELS[level][:2])}
    write_index(tmp_path, objects.hash_sources(), entries)
    monkeypatch.setattr(objects, "OBJECT_FOLDER", tmp_path)
    monkeypatch.setattr(objects.sys, "platform", "linux")
    return tmp_path


def write_index(folder: Path, sources: str, entries: dict[str, Any]) -> None:
    (folder / "objects.json").write_text(json.dumps({"sources": sources, "objects": entries}))


def pretend_processor(monkeypatch: pytest.MonkeyPatch, features: set[str], triple: str = X86) -> None:
    monkeypatch.setattr(target, "read_host_features", lambda: dict.fromkeys(features, True) | {"amx-tile": False})
    monkeypatch.setattr(target.llvm, "get_default_triple", lambda: triple)


@pytest.mark.parametrize("level", list(X86_LEVELS))
@pytest.mark.usefixtures("folder")
def test_a_processor_gets_the_best_object_whose_instructions_it_has(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    pretend_processor(monkeypatch, set(X86_LEVELS[level].required))
    assert objects.load_object(select_target(), "int8") == f"{level} int8".encode()
    assert objects.load_object(select_target(), "sample") == f"{level} sample".encode()
    monkeypatch.setenv(target.VARIABLE, "x86-64")
    assert objects.load_object(select_target(), "int8") == b"x86-64 int8"
    for missing in X86_LEVELS[level].required:
        pretend_processor(monkeypatch, set(X86_LEVELS[level].required) - {missing})
        monkeypatch.delenv(target.VARIABLE, raising=False)
        assert objects.load_object(select_target(), "int8") != f"{level} int8".encode()


@pytest.mark.usefixtures("folder")
def test_what_has_no_object_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_processor(monkeypatch, set(), "riscv64-unknown-linux-gnu")
    assert objects.load_object(select_target(), "int8") is None
    pretend_processor(monkeypatch, set())
    assert objects.load_object(select_target(), "int8")
    with monkeypatch.context() as patch:
        patch.setattr(objects.sys, "platform", "darwin")
        assert objects.load_object(select_target(), "int8") is None
    assert objects.load_object(select_target(), "int4") is None
    monkeypatch.setenv("NUMBA_CPU_NAME", "nehalem")
    assert objects.load_object(select_target(), "int8") is None


def test_objects_of_other_sources_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_processor(monkeypatch, set())
    entries = objects.read_index()["objects"]
    assert objects.load_object(select_target(), "int8")
    write_index(folder, "0" * 64, entries)
    objects.read_index.cache_clear()
    assert objects.load_object(select_target(), "int8") is None
    entries["x86-64"]["target"] = ["x86-64", "+avx"]  # the level had other instructions
    write_index(folder, objects.hash_sources(), entries)
    objects.read_index.cache_clear()
    assert objects.load_object(select_target(), "int8") is None
    assert not caplog.records  # as in a clone whose kernels have been changed


@pytest.mark.parametrize("damage", ["object", "index", "entry", "missing"])
def test_an_object_without_the_recorded_hash_is_never_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    pretend_processor(monkeypatch, set())
    other = (folder / "avx2.xz").read_bytes()  # valid, but code for another processor
    if damage == "object":
        (folder / "x86-64.xz").write_bytes(other)
    elif damage == "index":
        (folder / "objects.json").write_text("{")
    elif damage == "entry":
        write_index(folder, objects.hash_sources(), {"x86-64": "f00"})
    else:
        (folder / "x86-64.xz").unlink()
    assert objects.load_object(select_target(), "int8") is None
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    compiled = []
    monkeypatch.setattr(jit, "load_or_compile", lambda name: compiled.append(name) or (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        jit.load_entry_point("int8-of-a-test")
    assert compiled == ["int8-of-a-test"]


def test_without_numba_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> str:
        raise objects.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(objects.metadata, "version", fail)
    with pytest.raises(UserError, match="Numba, which compiles it, is not installed: pip install numba"):
        objects.compile_in_process(Request("sample"))
    monkeypatch.setattr(jit, "cache_path", lambda _: tmp_path / "missing.o")
    with pytest.raises(UserError, match="no machine code for this processor"):
        jit.load_or_compile("int8")
    assert not caplog.records  # nothing says that it compiles


def test_a_compiler_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match=r"compiling the CPU engine failed \(.*no-such-architecture.*\); use --engine"):
        objects.compile_in_process(Request("sample", "no-such-architecture", "generic"))


@pytest.mark.extended
@pytest.mark.parametrize(
    "request_",
    [Request("int8", X86, "x86-64-v3", "+avx2"), Request("sample", "aarch64-unknown-linux-gnu", "generic", "+neon")],
    ids=["x86", "ARM"],
)
def test_the_same_sources_give_the_same_object(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = objects.compile_in_process(request_)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_CPU_NAME", "nehalem")  # the processor of this machine does not matter
    assert objects.compile_in_process(request_) == first
    assert str(objects.SOURCE_FOLDER).encode() not in first


@linux_only
@pytest.mark.slow
def test_objects_compute_the_same_bits_as_code_compiled_here(tmp_path: Path) -> None:
    objects.make_objects([BEST], tmp_path / "objects")
    for precision in ("int8", "int8-a8", "int4", "fp32"):
        with_objects, compiled = (
            run_python("-c", LOGITS, precision, str(folder), TINYSTORIES_CACHE=str(tmp_path / "cache"))
            for folder in (tmp_path / "objects", tmp_path / "none")
        )
        assert with_objects.returncode == compiled.returncode == 0, with_objects.stderr + compiled.stderr
        assert with_objects.stdout == compiled.stdout
        assert "compiling" not in with_objects.stderr
        assert f"({precision}, once" in compiled.stderr


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("level", list(LEVELS))
def test_the_objects_of_this_tree_can_be_made_again(level: str) -> None:
    """Otherwise they hold code that is not in the sources, or were made with other versions."""
    index = objects.read_index()
    if objects.find_object(select_target()._replace(level=level)) is None:
        pytest.skip("no objects of these sources; `make objects`")
    if index["made_with"] != objects.read_versions():
        pytest.skip(f"made with {index['made_with']}")
    assert hashlib.sha256(objects.compile_level(level)).hexdigest() == index["objects"][level]["sha256"]
