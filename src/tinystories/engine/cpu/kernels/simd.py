"""SIMD inner loops of the matmuls as LLVM IR, and other things Numba cannot express: raw pointers and atomics.

LLVM maps the vectors to the instructions of the CPU (`vpmaddwd` on x86, `smlal` on ARM). The loops of quantized
matrices are in `simd_int8` and `simd_int4`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
F32X8 = ir.VectorType(F32, 8)

Value = Any  # llvmlite has no type annotations
Builder = Any


def const_i64(value: int) -> Value:
    """Return a 64-bit integer constant."""
    return ir.Constant(I64, value)


def splat(b: Builder, value: Value, vector: Value) -> Value:
    """Broadcast a scalar to all lanes of a vector type."""
    with_lane_0 = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    lane_0_mask = ir.Constant(ir.VectorType(I32, vector.count), None)
    return b.shuffle_vector(with_lane_0, ir.Constant(vector, ir.Undefined), lane_0_mask)


def load(b: Builder, base: Value, offset: Value, kind: Value, align: int) -> Value:
    """Load a value of type `kind` from the address base + offset (bytes)."""
    return b.load(b.inttoptr(b.add(base, offset), kind.as_pointer()), align=align)


def prefetch(b: Builder, address: Value, *, to_write: bool = False) -> None:
    """Fetch the cache line at an address, which need not be valid."""
    pointer = b.inttoptr(address, I8.as_pointer())
    flags = [ir.Constant(I32, value) for value in (int(to_write), 3, 1)]  # into all caches; data
    call_intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)


def madd_i16(b: Builder, weights: Value, x: Value) -> Value:
    """Multiply pairs of 16-bit integers and add adjacent products to 32-bit sums: w[0] x[0] + w[1] x[1], ...

    LLVM compiles this to one instruction on x86 (`vpmaddwd`). On ARM it takes two: even and odd pairs are multiplied
    apart, so that an addition to the result can be fused with a multiplication (`smlal`).
    """
    wide = ir.VectorType(I32, weights.type.count)
    even, odd = (ir.Constant(ir.VectorType(I32, wide.count // 2), list(range(i, wide.count, 2))) for i in (0, 1))
    if is_x86(b):
        products = b.mul(b.sext(weights, wide), b.sext(x, wide))
        return b.add(b.shuffle_vector(products, products, even), b.shuffle_vector(products, products, odd))
    half = ir.VectorType(I32, wide.count // 2)
    first, second = (
        b.mul(b.sext(b.shuffle_vector(weights, weights, mask), half), b.sext(b.shuffle_vector(x, x, mask), half))
        for mask in (even, odd)
    )
    return b.add(first, second)


def has_byte_dot(context: Any) -> bool:
    """Return whether the target multiplies 4 adjacent bytes and adds the products in one instruction (`dot_bytes`)."""
    if has_feature(context, "avx512vnni") and has_feature(context, "avx512vl"):
        return True
    return has_feature(context, "avxvnni") or has_feature(context, "dotprod")


def dot_bytes(b: Builder, totals: Value, weights: Value, x: Value) -> Value:
    """Add to a vector of totals the exact dot products of 4 bytes of weights with 4 signed bytes of x each.

    Weights are unsigned on x86, which takes 8 or 16 totals, and signed on ARM, which takes a multiple of 4.
    """
    n = totals.type.count
    if is_x86(b):
        return call_intrinsic(b, f"llvm.x86.avx512.vpdpbusd.{32 * n}", totals.type, totals, weights, x)
    if n == 4:
        return call_intrinsic(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", totals.type, totals, weights, x)
    halves = []
    for i in (0, 1):
        parts = (split_half(b, vector, i) for vector in (totals, weights, x))
        halves.append(dot_bytes(b, *parts))
    return concatenate(b, *halves)


def call_intrinsic(b: Builder, name: str, result: Value, *operands: Value) -> Value:
    """Call an LLVM intrinsic by name; `result` is the type it returns."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), operands)


def call_separately(
    b: Builder,
    name: str,
    args: Sequence[Value],
    result: Value,
    emit: Callable[[Builder, Sequence[Value]], Value | None],
) -> Value:
    """Call a function of its own, which `emit` fills, so that its loops do not share registers with those around it.

    `emit` gets a builder and the arguments, and returns the result (None if `result` is void). A module has one
    function of a name.
    """
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [arg.type for arg in args]), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block())
        value = emit(inner, function.args)
        if value is None:
            inner.ret_void()
        else:
            inner.ret(value)
    return b.call(function, args)


def has_feature(context: Any, name: str) -> bool:
    """Return whether the target that the code is compiled for has a feature, by LLVM's name of it; ARM's is "dotprod".

    Not whether this machine has it: LLVM aborts the process if an instruction is not in the target. A target whose
    features do not name it, although its processor implies it, gets the slower code, except for Apple's processors,
    whose features LLVM cannot list.
    """
    triple, processor, features = context.codegen().magic_tuple()
    if triple.startswith(("aarch64", "arm64")) != (name == "dotprod"):
        return False
    # As for LLVM, the last mention of a feature decides.
    mentions = [feature for feature in features.split(",") if feature.lstrip("+-") == name]
    return mentions[-1:] == [f"+{name}"] or (not mentions and processor.startswith("apple-m"))


def is_arm64(context: Any) -> bool:
    triple, _, _ = context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64"))


def is_x86(b: Builder) -> bool:
    return "x86" in b.module.triple or "amd64" in b.module.triple


def make_fp32_kernel(n_weights: int, n_rows: int) -> Callable[..., None]:
    """Make the fp32 matmul kernel: n_weights weight rows times n_rows rows of x, y[i, :n_weights] = w . x[i].

    It covers whole chunks of 8 columns; the caller adds the rest. Arguments, addresses unless noted: first weight row,
    its row stride (bytes), x, its row stride (bytes), columns // 8 (number), y, its row stride (bytes). The order of
    summation does not depend on n_weights or n_rows, so neither do the results.
    """

    @intrinsic
    def kernel(context, w, w_stride, x, x_stride, n_chunks, y, y_stride, ahead):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            w, w_stride, x, x_stride, n_chunks, y, y_stride, ahead = args
            w_rows = [b.add(w, b.mul(w_stride, const_i64(i))) for i in range(n_weights)]
            # 16 sums need the 32 registers of AVX-512.
            tile_rows = n_rows if has_feature(context, "avx512vl") else min(n_rows, 2)
            for first in range(0, n_rows, tile_rows):
                numbers = range(first, first + tile_rows)
                x_rows = [b.add(x, b.mul(x_stride, const_i64(i))) for i in numbers]
                sums = emit_fp32_tile(b, w_rows, x_rows, n_chunks, ahead)
                for i, vectors in zip(numbers, sums, strict=True):
                    store_horizontal_sums(b, vectors, b.add(y, b.mul(y_stride, const_i64(i))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return kernel


def emit_fp32_tile(
    b: Builder, w_rows: list[Value], x_rows: list[Value], n_chunks: Value, ahead: Value
) -> list[list[Value]]:
    """Multiply all rows of weights by all rows of x; return 8 partial sums for each row of x and of weights."""
    sums = [[cgutils.alloca_once_value(b, ir.Constant(F32X8, None)) for _ in w_rows] for _ in x_rows]
    with cgutils.for_range(b, n_chunks) as loop:
        offset = b.mul(loop.index, const_i64(32))
        if len(x_rows) > 1:  # for a single row, the processor's own prefetching is faster
            for row in w_rows:
                prefetch(b, b.add(b.add(row, offset), ahead))
        weights = [load(b, row, offset, F32X8, 4) for row in w_rows]
        for x_row, pointers in zip(x_rows, sums, strict=True):
            values = load(b, x_row, offset, F32X8, 4)
            for weight, pointer in zip(weights, pointers, strict=True):
                products = b.fmul(weight, values, flags=["contract"])
                b.store(b.fadd(b.load(pointer), products, flags=["contract"]), pointer)
    return [[b.load(pointer) for pointer in pointers] for pointers in sums]


def store_horizontal_sums(b: Builder, vectors: list[Value], y: Value) -> None:
    """Store the `horizontal_sum`s of 1 or 4 vectors of 8 next to each other at the address y."""
    if len(vectors) == 1:
        total = horizontal_sum(b, vectors[0])
    else:  # the same additions, four at a time: turn four halves into their four columns
        halves = [add_halves(b, vector) for vector in vectors]
        rows = concatenate(b, concatenate(b, *halves[:2]), concatenate(b, *halves[2:]))
        masks = [ir.Constant(ir.VectorType(I32, 4), list(range(column, 16, 4))) for column in range(4)]
        columns = [b.shuffle_vector(rows, rows, mask) for mask in masks]
        total = b.fadd(b.fadd(columns[0], columns[2]), b.fadd(columns[1], columns[3]))
    b.store(total, b.inttoptr(y, total.type.as_pointer()), align=4)


def horizontal_sum(b: Builder, vector: Value) -> Value:
    """Add up a vector of 8 by adding its halves three times."""
    for _ in range(3):
        vector = add_halves(b, vector)
    return b.extract_element(vector, ir.Constant(I32, 0))


def concatenate(b: Builder, low: Value, high: Value) -> Value:
    """Return a vector of the lanes of two vectors."""
    n = 2 * low.type.count
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, n), list(range(n))))


def split_half(b: Builder, vector: Value, i: int) -> Value:
    """Return the first (i = 0) or second (i = 1) half of a vector."""
    n = vector.type.count // 2
    return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, n), list(range(n * i, n * i + n))))


def add_halves(b: Builder, vector: Value) -> Value:
    """Add the second half of a vector to the first."""
    return b.fadd(split_half(b, vector, 0), split_half(b, vector, 1))


def make_pointer_cast(kind: Any) -> Callable[[int], Any]:
    """Return a Numba function that casts an address (int64) to a pointer to `kind`, for `numba.carray`."""

    @intrinsic
    def cast_to_pointer(context: Any, address: Any) -> Any:  # noqa: ARG001
        result = types.CPointer(kind)

        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            return b.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), codegen

    return cast_to_pointer


@intrinsic
def atomic_load(context: Any, address: Any) -> Any:  # noqa: ARG001
    """Load the 64-bit integer at an address (acquire)."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(context: Any, address: Any, value: Any) -> Any:  # noqa: ARG001
    """Store a 64-bit integer at an address (release)."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
        b.store_atomic(args[1], b.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_increment(context: Any, address: Any) -> Any:  # noqa: ARG001
    """Add 1 to the 64-bit integer at an address (acquire and release); return its new value."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.add(b.atomic_rmw("add", pointer, const_i64(1), "acq_rel"), const_i64(1))

    return types.int64(types.int64), codegen


@intrinsic
def compare_and_swap(context: Any, address: Any, expected: Any, desired: Any) -> Any:  # noqa: ARG001
    """Replace the 64-bit integer at an address if it equals `expected`; return whether it did (acquire and release)."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.extract_value(b.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(context: Any) -> Any:  # noqa: ARG001
    """Tell the core that this thread spins."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        if is_x86(b):
            call_intrinsic(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(context: Any) -> Any:  # noqa: ARG001
    """Let other threads of the machine run."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def bitcast_f32(context: Any, bits: Any) -> Any:  # noqa: ARG001
    """Reinterpret the bits of a 32-bit integer as fp32."""
    return types.float32(types.int32), lambda context, b, _, args: b.bitcast(args[0], F32)  # noqa: ARG005


assert sys.byteorder == "little", "bf16 scales and packed pairs are read as little-endian"
