"""Processors without AVX2 or dot products: slower code, or one line that says what is missing; never an abort."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import one_line_error, run_python, tinystories

from tinystories.engine.cpu import target
from tinystories.engine.cpu.jit import cache_path, numba_variables
from tinystories.engine.cpu.kernels.simd import has_feature
from tinystories.engine.cpu.target import LEVELS, list_available_levels, select_target

HERE = select_target().best_level
available = [
    name
    for name in LEVELS
    if name in list_available_levels(target.llvm.get_default_triple(), target.read_host_features())
]
x86_only = pytest.mark.skipif("x86-64" not in available, reason="levels of x86")
STORIES = """
import json, logging, sys, tinystories
storyteller = tinystories.load(precision=sys.argv[1], threads=1)
print(json.dumps([storyteller.generate("One day", seed=seed, max_tokens=60).ids for seed in range(50)]))
"""
# SHA-256 of the bits of logits: a prompt in two calls, and steps.
LOGITS = """
import hashlib, sys, tinystories
engine = tinystories.load(precision=sys.argv[1], threads=1).engine
logits = [engine.prefill(0, [7 * i % 4096 for i in range(150)]), *(engine.step([0], [i]) for i in range(20))]
print(hashlib.sha256(b"".join(part.tobytes() for part in logits)).hexdigest())
"""


def with_cpu(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (target.VARIABLE, *target.NUMBA_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def run_program(program: str, precision: str, cache: Path, **variables: str) -> str:
    """Run a program in a process of its own, with compiled code of its own; return what it prints."""
    result = run_python("-c", program, precision, TINYSTORIES_CACHE=str(cache), **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def best_stories() -> str:
    return run_python("-c", STORIES, "int8").stdout


@pytest.fixture(scope="module")
def best_logits() -> dict[str, str]:
    return {precision: run_python("-c", LOGITS, precision).stdout for precision in ("int8", "int8-a8")}


@pytest.mark.extended
@pytest.mark.parametrize("level", available)
def test_every_level_of_this_machine_computes_the_same_bits_in_int8(
    tmp_path: Path, best_logits: dict[str, str], level: str
) -> None:
    for precision, expected in best_logits.items():
        assert run_program(LOGITS, precision, tmp_path, TINYSTORIES_CPU=level) == expected
    assert run_program(STORIES, "fp32", tmp_path, TINYSTORIES_CPU=level)  # equal only up to rounding


@x86_only
@pytest.mark.extended
@pytest.mark.parametrize(
    "variables",
    [
        {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""},  # reported: LLVM aborted the process
        {"NUMBA_CPU_NAME": "ivybridge", "NUMBA_CPU_FEATURES": ""},
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_ENABLE_AVX": "0"},
        {"NUMBA_CPU_FEATURES": "-avx2,-avx512f"},
    ],
    ids=str,
)
def test_numbas_own_variables_are_respected(tmp_path: Path, best_stories: str, variables: dict[str, str]) -> None:
    assert run_program(STORIES, "int8", tmp_path, **variables) == best_stories


@x86_only
@pytest.mark.extended
def test_a_level_can_be_compiled_by_a_process_that_uses_numba_for_another(tmp_path: Path) -> None:
    program = (
        "import numba\n"
        "numba.njit(lambda x: x + 1)(1)\n"
        "import tinystories\n"
        "tinystories.load()\n"
        "assert numba.njit(lambda x: x + 2)(1) == 3\n"
    )
    result = run_python(
        "-c", program, TINYSTORIES_CACHE=str(tmp_path), TINYSTORIES_CPU="x86-64", NUMBA_CPU_NAME="nehalem"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [("generate",), ("warmup",), ("info",)], ids=str)
def test_an_unknown_level_is_one_line_that_lists_the_known_ones(words: tuple[str, ...]) -> None:
    error = one_line_error(tinystories(*words, TINYSTORIES_CPU="pentium"))
    assert error == (
        "error: TINYSTORIES_CPU='pentium' is unknown; use one of x86-64, x86-64-v2, avx2,"
        " avx2-vnni, avx512, avx512-vnni, neon, neon-dotprod, or unset it"
    )


def test_a_level_that_the_machine_does_not_have_is_one_line() -> None:
    other = "neon" if "x86-64" in available else "avx2"
    error = one_line_error(tinystories("generate", TINYSTORIES_CPU=other))
    assert f"TINYSTORIES_CPU={other}: this processor (" in error
    assert f"does not have it; it has {', '.join(available)}" in error


OLD = {"cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2", "avx"}  # Ivy Bridge
HASWELL = OLD | {"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"}


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", set(), ["x86-64"]),
        ("x86_64-unknown-linux-gnu", OLD, ["x86-64", "x86-64-v2"]),
        ("x86_64-pc-windows-msvc", HASWELL, ["x86-64", "x86-64-v2", "avx2"]),
        ("x86_64-unknown-linux-gnu", HASWELL - {"fma"}, ["x86-64", "x86-64-v2"]),  # VIA has AVX2 without FMA
        ("x86_64-unknown-linux-gnu", HASWELL | {"avx512f"}, ["x86-64", "x86-64-v2", "avx2"]),  # Knights Landing
        ("x86_64-unknown-linux-gnu", HASWELL | {"avxvnni"}, ["x86-64", "x86-64-v2", "avx2", "avx2-vnni"]),
        ("x86_64-unknown-linux-gnu", HASWELL | {"avx512vnni"}, ["x86-64", "x86-64-v2", "avx2"]),  # without the OS
        ("aarch64-unknown-linux-gnu", {"neon"}, ["neon"]),
        ("aarch64-unknown-linux-gnu", {"neon", "dotprod"}, ["neon", "neon-dotprod"]),
        ("arm64-apple-darwin23.0.0", set(), ["neon"]),
        ("riscv64-unknown-linux-gnu", set(), []),
    ],
    ids=[
        "Athlon 64",
        "Ivy Bridge",
        "Haswell",
        "without FMA",
        "Knights Landing",
        "Alder Lake",
        "no AVX-512",
        "Graviton 1",
        "Graviton 2",
        "Apple",
        "RISC-V",
    ],
)
def test_the_levels_of_a_machine_follow_from_its_features(triple: str, features: set[str], expected: list[str]) -> None:
    host_features = {feature: feature in features for feature in HASWELL | features | {"avx512f", "dotprod"}}
    assert list_available_levels(triple, host_features) == expected


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", "+avx,+avx2,-avx512f", True),
        ("x86_64-unknown-linux-gnu", "", False),  # reported: this machine was asked, not the target
        ("x86_64-unknown-linux-gnu", "-avx2", False),
        ("x86_64-unknown-linux-gnu", "+avx2,-avx2", False),
        ("x86_64-unknown-linux-gnu", "-avx2,+avx2", True),
        ("x86_64-unknown-linux-gnu", "+avx", False),
        ("aarch64-unknown-linux-gnu", "+neon,+avx2", False),
    ],
)
def test_avx2_is_a_feature_of_the_target(triple: str, features: str, expected: bool) -> None:
    codegen = SimpleNamespace(magic_tuple=lambda: (triple, "some-processor", features))
    assert has_feature(SimpleNamespace(codegen=lambda: codegen), "avx2") == expected


@pytest.mark.parametrize(
    ("triple", "processor", "features", "expected"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod", True),
        ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon", False),
        ("arm64-apple-darwin23.0.0", "apple-m1", "", True),  # LLVM does not list the features of Apple's processors
        ("arm64-apple-darwin23.0.0", "apple-m1", "-dotprod", False),
        ("arm64-apple-darwin23.0.0", "generic", "+neon", False),
        ("x86_64-unknown-linux-gnu", "znver4", "+dotprod", False),
    ],
)
def test_dot_products_are_a_feature_of_arm_targets(triple: str, processor: str, features: str, expected: bool) -> None:
    codegen = SimpleNamespace(magic_tuple=lambda: (triple, processor, features))
    assert has_feature(SimpleNamespace(codegen=lambda: codegen), "dotprod") == expected


def test_every_target_has_machine_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    variables: list[dict[str, str]] = [{"TINYSTORIES_CPU": level} for level in available]
    variables += [{}, {"NUMBA_CPU_NAME": "nehalem"}, {"NUMBA_CPU_FEATURES": ""}, {"NUMBA_ENABLE_AVX": "0"}]
    for some in variables:
        with_cpu(monkeypatch, **some)
        paths.append(cache_path("int8"))
    assert len(set(paths)) == len(paths)
    with_cpu(monkeypatch, TINYSTORIES_CPU="")  # empty: as if it were not set
    assert cache_path("int8") == paths[len(available)]


def test_info_says_which_level_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch)
    facts = select_target().as_facts()
    assert (facts["level"], facts["reason"]) == (HERE, "the best that this processor has")
    with_cpu(monkeypatch, TINYSTORIES_CPU=available[0], NUMBA_CPU_NAME="nehalem")
    facts = select_target().as_facts()
    assert facts["level"] == available[0]
    assert facts["processor"] == LEVELS[available[0]].processor  # the level has precedence
    assert facts["reason"] == f"set by TINYSTORIES_CPU; otherwise {HERE}"
    with_cpu(monkeypatch, NUMBA_CPU_NAME="nehalem")
    assert select_target().as_facts()["processor"] == "nehalem"
    assert "set by NUMBA_CPU_NAME" in select_target().reason
    with_cpu(monkeypatch, TINYSTORIES_CPU=available[0])
    output = tinystories("info")
    assert f"set by TINYSTORIES_CPU; otherwise {HERE}" in output.stdout


def test_a_level_has_precedence_over_numbas_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cpu(monkeypatch, TINYSTORIES_CPU=available[0], NUMBA_CPU_NAME="nehalem")
    variables = numba_variables(select_target())
    assert variables["NUMBA_CPU_NAME"] == LEVELS[available[0]].processor
    assert variables["NUMBA_CPU_FEATURES"] == LEVELS[available[0]].features
    with_cpu(monkeypatch, NUMBA_CPU_NAME="nehalem")
    assert numba_variables(select_target()) == {}


def test_a_processor_whose_features_are_unknown_has_the_lowest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, bool]:
        raise RuntimeError("LLVM cannot tell")

    with_cpu(monkeypatch)
    monkeypatch.setattr(target.llvm, "get_host_cpu_features", fail)
    assert select_target().best_level == ("x86-64" if "x86-64" in available else HERE)
