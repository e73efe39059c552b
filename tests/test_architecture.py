"""The import order of docs/architecture.md, and that generating stories does not import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "tinystories"
ORDER = [
    "errors",
    "files progress single_page training_kernels",
    "loss_kernels",
    "config position_tables figure",
    "config_file",
    "model data",
    "checkpoint",
    "weights",
    "engine",
    "explain",
    "generate",
    "evaluate",
    "formats",
    "hub",
    "api",
    "bench",
    "train",
    "sweep",
    "serve",
    "cli",
    "__main__",
]
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names.split()}


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield the first part after "tinystories." of everything the file imports, including inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
            if node.module == "tinystories":
                names = [f"tinystories.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("tinystories.") and not name.startswith("tinystories.__"):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(SRC).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for there in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
        assert there == here or LEVEL[there] < LEVEL[here], f"{here} must not import {there}"


def test_rule_detects_imports_inside_functions() -> None:
    wrong = ast.parse("def f():\n    from tinystories.train import loop\n    import tinystories.cli")
    assert set(imports_of(wrong)) == {"train", "cli"}


@pytest.mark.parametrize(
    "module",
    [
        "tinystories",
        "tinystories.cli",
        "tinystories.checkpoint",
        "tinystories.data.prepare",
        "tinystories.data.source.resolve",
        "tinystories.data.tokenizer",
        "tinystories.engine.cpu.engine",
        "tinystories.engine.protocol",
        "tinystories.engine.trace.trace",
        "tinystories.explain.text_trace",
        "tinystories.evaluate.bits",
        "tinystories.generate.output",
        "tinystories.generate.sampling",
        "tinystories.generate.batching",
        "tinystories.weights.load",
        "tinystories.hub.card",
        "tinystories.hub.client",
        "tinystories.serve.server",
    ],
)
def test_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_server_imports_nothing_of_training() -> None:
    for path in (SRC / "serve").glob("*.py"):
        assert not {"train", "sweep", "bench", "model"} & set(imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    program = (
        "import sys, tinystories.serve.server;"
        "sys.exit(any(name.startswith(('tinystories.train', 'tinystories.cli')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_no_format_imports_another() -> None:
    packages = [path.name for path in (SRC / "formats").iterdir() if (path / "__init__.py").exists()]
    assert len(packages) == 6
    for package in packages:
        others = tuple(f"tinystories.formats.{name}" for name in packages if name != package)
        for path in (SRC / "formats" / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                assert not module.startswith(others), f"{path} imports {module}"


def test_no_pickle_and_no_eval() -> None:
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "marshal", "shelve", "dill"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert path.relative_to(SRC).as_posix() == "formats/torch_file.py", path
                assert "weights_only=True" in ast.unparse(node)
