"""The int8 tiles of every processor compute exact sums, with the instructions and the registers they are meant for."""

import ctypes
import re
from collections.abc import Callable
from types import SimpleNamespace

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from llvmlite import ir

from tinystories.engine.cpu.kernels import simd_int8
from tinystories.engine.cpu.kernels.layout import CALL
from tinystories.engine.cpu.kernels.matmul import KERNELS
from tinystories.engine.cpu.kernels.memory import make_context
from tinystories.engine.cpu.kernels.simd import I64
from tinystories.engine.cpu.target import LEVELS, list_available_levels, read_host_features
from tinystories.weights.quantize import allocate_aligned, pack_int8, round_up

Target = tuple[str, str, str]  # triple, processor, features
SHAPES = [(1, 1), *((n_rows, n_blocks) for n_rows in (2, 4, 8) for n_blocks in (1, 2))]
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
HERE = llvm.get_default_triple()
BITS = [16, 8]  # of x


def targets_of_this_machine() -> dict[str, Target]:
    features = read_host_features()
    own = ",".join(f"{'+' if has else '-'}{name}" for name, has in features.items())
    targets = {"its own": (HERE, llvm.get_host_cpu_name(), own)}
    for name in list_available_levels(HERE, features):
        targets[name] = (HERE, LEVELS[name].processor, LEVELS[name].features)
    if "avx512-vnni" in targets:  # the tiles of AVX-VNNI, whose instructions have another encoding
        targets["256 bits"] = (HERE, "x86-64-v3", "+avx2,+avx512f,+avx512vl,+avx512vnni")
    return targets


TARGETS_HERE = targets_of_this_machine()


def select_tiling(target: Target, bits: int) -> simd_int8.Tiling:
    codegen = SimpleNamespace(magic_tuple=lambda: target)
    return simd_int8.select_tiling(SimpleNamespace(codegen=lambda: codegen), bits)


def compile_tiles(target: Target, bits: int) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """Compile a function for every shape; a single row of x has a loop of its own."""
    triple, processor, features = target
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    tiling = select_tiling(target, bits)
    for n_rows, n_blocks in SHAPES:
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(simd_int8.TileArgs._fields))
        function = ir.Function(module, kind, f"kernel_{n_rows}_{n_blocks}")
        b, args = ir.IRBuilder(function.append_basic_block()), simd_int8.TileArgs(*function.args)
        if n_rows == 1:
            simd_int8.emit_tile(b, tiling, args, 1, 16 // tiling.lanes)
        else:
            simd_int8.emit_block_tiles(b, tiling, args, n_rows, n_blocks)
        b.ret_void()
    parsed = llvm.parse_assembly(str(module))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return parsed, machine


def store_x(values: np.ndarray, *, as_bytes: bool) -> np.ndarray:
    """Store integers as the tiles read them: 16 bits, or bytes and -128 times their sum in the second half of a row."""
    n_rows, width = values.shape
    padded = round_up(width, 32)
    x = allocate_aligned((n_rows, padded), np.int16)
    x[...] = 0
    if as_bytes:
        x.view(np.int8)[:, :width] = values
        x.view(np.int32)[:, padded // 4] = -128 * values.sum(axis=1)
        x.view(np.int32)[:, padded // 4 + 1 :] = -1  # read by none
    else:
        x[:, :width] = values
    return x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("target", TARGETS_HERE.values(), ids=TARGETS_HERE)
def test_tiles_compute_exact_sums(target: Target, bits: int) -> None:
    """Bit for bit, up to the largest sums that the range of x allows, for widths that fill no vector."""
    rng = np.random.default_rng(0)
    module, machine = compile_tiles(target, bits)
    as_bytes = select_tiling(target, bits).tile is simd_int8.ByteTile
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    for n_rows, n_blocks in SHAPES:
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(simd_int8.TileArgs._fields))
        kernel = call(engine.get_function_address(f"kernel_{n_rows}_{n_blocks}"))
        for width in (1, 4, 6, 20, 36, 240, 1376):
            n_out, limit = 16 * n_blocks, min(2 ** (bits - 1) - 1, (2**31 - 1) // (127 * width))
            weights = rng.integers(-127, 128, (n_out, width)).astype(np.int8)
            values = rng.integers(-limit, limit + 1, (n_rows, width))
            weights[0], weights[1], values[0], values[-1, ::2] = 127, -127, limit, -limit
            x = store_x(values, as_bytes=as_bytes)
            scales, x_scales = (allocate_aligned((n,), np.float32) for n in (n_out, n_rows))
            scales[:], x_scales[:] = rng.standard_normal(n_out), rng.standard_normal(n_rows)
            y = allocate_aligned((n_rows, n_out), np.float32)
            w, n_steps = pack_int8(weights), -(-width // 4)
            addresses = w.ctypes.data, x.ctypes.data, y.ctypes.data, scales.ctypes.data, x_scales.ctypes.data
            args = simd_int8.TileArgs(
                w=addresses[0],
                block_bytes=64 * n_steps,
                n_steps=n_steps,
                x=addresses[1],
                x_stride=x.strides[0],
                y=addresses[2],
                y_stride=y.strides[0],
                scales=addresses[3],
                x_scales=addresses[4],
                prefetch=64,
                spread=1,
            )
            kernel(*args)
            sums = values @ weights.T.astype(np.int64)
            assert np.abs(sums).max() < 2**31
            assert (y == sums.astype(np.float32) * (scales * x_scales[:, None])).all(), (n_rows, n_blocks, width)


ROWS = {
    "of any size": lambda rng: rng.standard_normal((5, 70)) * np.float32(10) ** rng.integers(-20, 20, (5, 1)),
    "of integers and halves": lambda rng: np.append(rng.integers(-254, 255, (5, 69)) / 2, np.full((5, 1), 127), axis=1),
    "that is long": lambda rng: rng.standard_normal((2, 4000)),
    "of zeros": lambda _: np.zeros((1, 33)),
    "of almost zeros": lambda _: np.full((1, 33), 1e-31),
    "with infinity": lambda _: np.array([[1, np.inf, -2]]),
    "with NaN": lambda _: np.array([[1, -np.nan, np.inf]]),
}


@pytest.fixture(scope="module")
def quantize_x() -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Return a function that quantizes rows of floats for int8 weights; it returns the integers and the scales."""
    runs = {}
    for bits, precision in ((16, "int8"), (8, "int8-a8")):
        kernels = KERNELS[precision]

        @numba.njit(error_model="numpy")
        def run(c, n, kernels=kernels):  # type: ignore[no-untyped-def]
            ctx = make_context(c, kernels, np.float32(0), 0, 1, 0)
            for b in range(c[CALL.n_rows]):
                kernels.quantize_row(ctx.x + 4 * n * b, n, b, ctx)

        runs[bits] = run

    def quantize(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
        n_rows, n = x.shape
        width, c = round_up(n, 32), np.zeros(CALL.size, np.int64)
        scratch = allocate_aligned((n_rows * (8 * width + 64),), np.uint8)
        scratch[...] = 0xFF
        scratch[: 4 * x.size].view(np.float32)[:] = x.reshape(-1)
        c[CALL.n_rows], c[CALL.max_rows], c[CALL.scratch_width] = n_rows, n_rows, width
        c[CALL.scratch] = scratch.ctypes.data
        runs[bits](c, n)
        scales = scratch[6 * n_rows * width :][: 4 * n_rows].view(np.float32)
        rows = scratch[4 * n_rows * width : 6 * n_rows * width].reshape(n_rows, -1)
        if bits == 8 and select_tiling(TARGETS_HERE["its own"], bits).tile is simd_int8.ByteTile:
            integers = rows[:, :width].view(np.int8)
            assert (rows[:, width : width + 4].view(np.int32)[:, 0] == -128 * integers.sum(axis=1, dtype=int)).all()
        else:
            integers = rows.view(np.int16)
        assert not integers[:, n:].any()
        return integers[:, :n], scales

    return quantize


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_quantized_as_defined(
    quantize_x: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    rows: Callable[[np.random.Generator], np.ndarray],
    bits: int,
) -> None:
    """Bit for bit as docs/cpu-engine.md says."""
    x = rows(np.random.default_rng(0)).astype(np.float32)
    integers, scales = quantize_x(x, bits)
    limit = np.float32(min(2 ** (bits - 1) - 1, (2**31 - 1) // (127 * x.shape[1])))
    for row, found, scale in zip(x, integers, scales, strict=True):
        largest = np.abs(row).max()
        if not np.isfinite(row).all():
            assert np.isnan(scale)
            continue
        inverse = limit / largest if largest > np.float32(1e-30) else np.float32(0)
        assert (found == np.rint(row * inverse)).all()
        assert scale == largest / limit


@pytest.mark.parametrize(
    ("target", "words", "bytes_"),
    [
        ((X86, "znver4", LEVELS["avx512-vnni"].features), r"vpdpwssd\s.*%zmm", r"vpdpbusd\s.*%zmm"),
        ((X86, "x86-64-v4", LEVELS["avx512"].features), r"vpmaddwd\s.*%zmm", None),
        ((X86, "alderlake", "+avx2,+fma,+avxvnni"), r"vpdpwssd\s.*%ymm", r"vpdpbusd\s.*%ymm"),
        ((X86, "x86-64-v3", LEVELS["avx2"].features), r"vpmaddwd\s.*%ymm", None),
        ((X86, "x86-64-v2", ""), r"\spmaddwd\s.*%xmm", None),
        ((ARM, "neoverse-n1", "+neon,+dotprod"), r"sdot\s+v\d+\.4s", r"sdot\s+v\d+\.4s"),
        (("arm64-apple-darwin23.0.0", "apple-m1", ""), r"sdot", r"sdot"),
        ((ARM, "generic", LEVELS["neon"].features), r"smlal2?\s", None),
    ],
    ids=["AVX-512 VNNI", "AVX-512", "AVX-VNNI", "AVX2", "SSE", "dotprod", "Apple", "neon"],
)
@pytest.mark.parametrize("bits", BITS)
def test_tiles_stay_in_registers(target: Target, words: str, bytes_: str | None, bits: int) -> None:
    """No wide vector goes to the stack and back (with SSE, two of a tile do).

    Where no instruction multiplies four bytes, x of 8 bits is multiplied as x of 16 bits.
    """
    module, machine = compile_tiles(target, bits)
    assembly = machine.emit_assembly(module)
    assert re.search((bytes_ if bits == 8 else None) or words, assembly)
    # Without the functions that only call tiles: they copy arguments from the stack, several at a time.
    tiles = re.findall(r"^_?(?:int8_|kernel_1_1).*?(?=^\w+:|\Z)", assembly, re.MULTILINE | re.DOTALL)
    assert len(tiles) >= 3
    for tile in tiles:
        assert not re.search(r"[yz]mm\d+.*\(%rsp\)|\(%rsp\).*[yz]mm\d+|\sst[rp]\s+q\d+.*\[sp", tile)
