"""SIMD inner loops of attention as LLVM IR: scores of queries and keys, and weighted sums of values.

In fp16, keys are blocks (D, KEY_BLOCK) of adjacent positions; in fp32 they are rows of D numbers, as in the cache of
the torch engine. Values are rows. Every result is computed in the same order whatever the number of rows in a tile and
the processor: a score has 8 partial sums, over dimensions d = 0..7 modulo 8, whose halves are added three times; a
weighted sum adds one position after the other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinystories.engine.cpu.kernels.elementwise import add, exp, from_f16, to_f16
from tinystories.engine.cpu.kernels.lanes import N_BYTES, WIDTHS, Lanes, emit_loops, fold, load_lanes, vector
from tinystories.engine.cpu.kernels.layout import KEY_BLOCK
from tinystories.engine.cpu.kernels.simd import (
    F32,
    F32X8,
    I16,
    I32,
    Builder,
    Value,
    call_separately,
    const_i64,
    has_feature,
    horizontal_sum,
    is_arm64,
    load,
    prefetch,
    splat,
)

LANES = 8
LINE = 64  # bytes of a cache line
N_PARTIAL = 8  # partial sums of a score
PARTIAL_ORDER = (0, 4, 2, 6, 1, 5, 3, 7)  # neighbors are added first: halves of 8, of 4, of 2


def load_f32(context: Any, b: Builder, address: Value, offset: int, kind: Value, width: int) -> Value:
    """Load `width` numbers of type `kind` (fp32, or fp16 as I16) from address + offset (bytes), converted to fp32."""
    value = load(b, address, const_i64(offset), vector(kind, width), N_BYTES[kind])
    if kind == F32:
        return value
    if has_f16(context):
        return b.fpext(b.bitcast(value, vector(ir.HalfType(), width)), vector(F32, width))
    return from_f16(Lanes(b, value)).value  # LLVM would call a function for each number


def has_f16(context: Any) -> bool:
    """Return whether the target has instructions that convert fp16."""
    return is_arm64(context) or has_feature(context, "f16c")


def element_address(b: Builder, address: Value, index: Value, stride: Value | int) -> Value:
    """Return address + index * stride."""
    return b.add(address, b.mul(index, const_i64(stride) if isinstance(stride, int) else stride))


def store_f32(b: Builder, value: Value, address: Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=4)


class ScoreShape(NamedTuple):
    """How many sums of scores stay in registers at once: lanes times queries times partial sums."""

    lanes: int  # adjacent positions
    n_queries: int
    n_partial: int  # of the 8 partial sums of a score


def select_score_shape(context: Any, n_queries: int) -> ScoreShape:
    """Return the shape for the target that the code is compiled for; a single query has room for all partial sums."""
    if has_feature(context, "avx512f"):
        lanes, n_together, n_partial = 16, 4, 4
    elif has_feature(context, "avx2"):
        lanes, n_together, n_partial = 8, 2, 4
    else:
        lanes, n_together, n_partial = 4, 4, 4 if is_arm64(context) else 2
    return ScoreShape(lanes, 1, N_PARTIAL) if n_queries == 1 else ScoreShape(lanes, n_together, n_partial)


def make_score_kernel(n_queries: int, kind: Value) -> Callable[..., None]:
    """Make the kernel of scores[i, s] = q[i] . keys[s] for whole blocks of KEY_BLOCK positions.

    Arguments, addresses unless noted: queries (fp32), their stride (bytes), keys of type `kind`, number of blocks,
    scores (fp32), their stride (bytes), D (number), bytes from the keys to what a single query prefetches (number).
    """

    @intrinsic
    def kernel(context, q, q_stride, keys, n_blocks, scores, score_stride, D, ahead):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def emit(context: Any, b: Builder, args: Sequence[Value]) -> None:
            q, q_stride, keys, n_blocks, scores, score_stride, D, ahead = args
            shape, row_bytes = select_score_shape(context, n_queries), KEY_BLOCK * N_BYTES[kind]
            n_chunks, tail = b.udiv(D, const_i64(N_PARTIAL)), b.urem(D, const_i64(N_PARTIAL))
            floats = ir.VectorType(F32, shape.lanes)

            def add_product(total: Value, query: Value, d: Value, key: Value) -> Value:
                x = load_f32(context, b, element_address(b, query, d, 4), 0, F32, 1)
                return b.fadd(total, b.fmul(splat(b, x, floats), key))

            def add_up(partial: Sequence[int], queries: list[Value], first_key: Value, *, prefetches: bool) -> Any:
                """Return these partial sums of each query."""
                zero = ir.Constant(floats, [0.0] * shape.lanes)
                sums = [[cgutils.alloca_once_value(b, zero) for _ in partial] for _ in queries]
                with cgutils.for_range(b, n_chunks) as chunks:
                    chunk = b.mul(chunks.index, const_i64(N_PARTIAL))
                    row = element_address(b, first_key, chunk, row_bytes)
                    if prefetches:
                        for line in range(0, N_PARTIAL * row_bytes, LINE):
                            prefetch(b, b.add(b.add(row, ahead), const_i64(line)))
                    for i, j in enumerate(partial):
                        key = load_f32(context, b, row, j * row_bytes, kind, shape.lanes)
                        for query, pointers in zip(queries, sums, strict=True):
                            total = add_product(b.load(pointers[i]), query, b.add(chunk, const_i64(j)), key)
                            b.store(total, pointers[i])
                return [[b.load(pointer) for pointer in pointers] for pointers in sums]

            def combine(n: int, first: int, queries: list[Value], first_key: Value, *, prefetches: bool) -> list[Value]:
                """Return the sums of the partial sums first, first + N_PARTIAL / n, ...: those of a half, of both."""
                order = PARTIAL_ORDER[first : first + n]
                if n <= shape.n_partial:
                    parts = add_up(order, queries, first_key, prefetches=prefetches)
                    return [add_pairs(b, vectors) for vectors in parts]
                left = combine(n // 2, first, queries, first_key, prefetches=prefetches)
                right = combine(n // 2, first + n // 2, queries, first_key, prefetches=False)
                return [b.fadd(x, y) for x, y in zip(left, right, strict=True)]

            with cgutils.for_range(b, n_blocks) as loop:
                block = element_address(b, keys, loop.index, b.mul(D, const_i64(row_bytes)))
                for lane in range(0, KEY_BLOCK, shape.lanes):
                    first_key = b.add(block, const_i64(lane * N_BYTES[kind]))
                    offset = b.add(b.mul(loop.index, const_i64(4 * KEY_BLOCK)), const_i64(4 * lane))
                    for first in range(0, n_queries, shape.n_queries):
                        numbers = [const_i64(i) for i in range(first, first + shape.n_queries)]
                        queries = [element_address(b, q, i, q_stride) for i in numbers]
                        outputs = [b.add(element_address(b, scores, i, score_stride), offset) for i in numbers]
                        prefetches = n_queries == 1 and lane == 0
                        totals = combine(N_PARTIAL, 0, queries, first_key, prefetches=prefetches)
                        for total, output in zip(totals, outputs, strict=True):
                            store_f32(b, total, output)
                        with cgutils.for_range(b, tail) as dimensions:  # what is left if D is not a multiple of 8
                            d = b.add(b.mul(n_chunks, const_i64(N_PARTIAL)), dimensions.index)
                            row = element_address(b, first_key, d, row_bytes)
                            key = load_f32(context, b, row, 0, kind, shape.lanes)
                            for query, output in zip(queries, outputs, strict=True):
                                store_f32(
                                    b, add_product(load(b, output, const_i64(0), floats, 4), query, d, key), output
                                )

        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            call_separately(b, f"scores_{n_queries}_{kind}", args, ir.VoidType(), functools.partial(emit, context))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return kernel


def add_pairs(b: Builder, vectors: list[Value]) -> Value:
    """Return the sum of 2, 4 or 8 vectors: of neighbors, then of their sums, and so on."""
    while len(vectors) > 1:
        vectors = [b.fadd(x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def shuffle(b: Builder, left: Value, right: Value, lanes: list[int]) -> Value:
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def sum_each(b: Builder, vectors: list[Value]) -> Value:
    """Return the sums of 8 vectors of 8 as one vector. Each is the sum that `horizontal_sum` computes."""
    # Which vectors meet is chosen so that each step shuffles within halves of a register, and the result is in order.
    steps = [
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]),
    ]
    vectors = [vectors[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    for low, high in steps:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(shuffle(b, x, y, low), shuffle(b, x, y, high)) for x, y in pairs]
    return vectors[0]


def make_row_score_kernel(n_queries: int, n_keys: int) -> Callable[..., None]:
    """Make the kernel of scores[i, s] = q[i] . keys[s] for rows of keys, n_queries by n_keys at a time: 8 scores, or 1.

    The scores are those of `make_score_kernel`, bit for bit. Arguments, addresses unless noted: queries, their stride
    (bytes), keys, number of keys, at least n_keys, scores, their stride (bytes), D (number).
    """
    assert n_queries * n_keys in (1, LANES)

    @intrinsic
    def kernel(context, q, q_stride, keys, n, scores, score_stride, D):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            q, q_stride, keys, n, scores, score_stride, D = args
            key_stride = b.mul(D, const_i64(4))
            queries = [element_address(b, q, const_i64(i), q_stride) for i in range(n_queries)]
            n_chunks, tail = b.sdiv(D, const_i64(LANES)), b.srem(D, const_i64(LANES))
            n_groups = b.sdiv(b.add(n, const_i64(n_keys - 1)), const_i64(n_keys))
            last_group = b.sub(n, const_i64(n_keys))
            with cgutils.for_range(b, n_groups) as loop:
                # The last group overlaps the one before it and computes the same scores again.
                s = b.mul(loop.index, const_i64(n_keys))
                s = b.select(b.icmp_signed("<", s, last_group), s, last_group)
                key_rows = [element_address(b, keys, b.add(s, const_i64(j)), key_stride) for j in range(n_keys)]
                outputs = [
                    element_address(b, element_address(b, scores, const_i64(i), score_stride), s, 4)
                    for i in range(n_queries)
                ]
                zero = ir.Constant(F32X8, [0.0] * LANES)
                sums = [cgutils.alloca_once_value(b, zero) for _ in range(n_queries * n_keys)]
                with cgutils.for_range(b, n_chunks) as chunks:
                    offset = b.mul(chunks.index, const_i64(LANES))
                    loaded_keys = [
                        load_f32(context, b, element_address(b, row, offset, 4), 0, F32, LANES) for row in key_rows
                    ]
                    for i, query in enumerate(queries):
                        loaded_query = load_f32(context, b, element_address(b, query, offset, 4), 0, F32, LANES)
                        for pointer, key in zip(sums[i * n_keys :], loaded_keys, strict=False):
                            b.store(b.fadd(b.load(pointer), b.fmul(loaded_query, key)), pointer)
                if len(sums) == 1:
                    store_f32(b, horizontal_sum(b, b.load(sums[0])), outputs[0])
                else:
                    results = sum_each(b, [b.load(pointer) for pointer in sums])
                    for i, output in enumerate(outputs):
                        store_f32(b, shuffle(b, results, results, list(range(i * n_keys, (i + 1) * n_keys))), output)
                with cgutils.for_range(b, tail) as dimensions:  # what is left if D is not a multiple of 8
                    d = b.add(b.mul(n_chunks, const_i64(LANES)), dimensions.index)
                    for query, output in zip(queries, outputs, strict=True):
                        x = load_f32(context, b, element_address(b, query, d, 4), 0, F32, 1)
                        for j, row in enumerate(key_rows):
                            key = load_f32(context, b, element_address(b, row, d, 4), 0, F32, 1)
                            total = b.fadd(load(b, output, const_i64(4 * j), F32, 4), b.fmul(x, key))
                            store_f32(b, total, b.add(output, const_i64(4 * j)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return kernel


def make_value_kernel(n_rows: int, kind: Value) -> Callable[..., None]:
    """Make the kernel of y[i] = sum over positions s of weights[i, s] * values[s], for n_rows rows of weights.

    Arguments, addresses unless noted: weights (fp32), their stride (bytes), values of type `kind`, number of positions,
    y (fp32), its stride (bytes), D (number), bytes from the values to what a single row prefetches (number).
    """

    @intrinsic
    def kernel(context, weights, weight_stride, values, n, y, y_stride, D, ahead):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def emit(context: Any, b: Builder, args: Sequence[Value]) -> None:
            weights, weight_stride, values, n, y, y_stride, D, ahead = args
            weight_rows = [element_address(b, weights, const_i64(i), weight_stride) for i in range(n_rows)]
            value_stride = b.mul(D, const_i64(N_BYTES[kind]))

            def add_up(d: Value, widths: list[int]) -> None:
                """Compute vectors of these widths, of dimensions from d on."""
                kinds = [vector(F32, width) for width in widths]
                zeros = [
                    ir.Constant(kind, [0.0] * width if width > 1 else 0.0)
                    for kind, width in zip(kinds, widths, strict=True)
                ]
                offsets = [sum(widths[:v]) for v in range(len(widths))]
                sums = [[cgutils.alloca_once_value(b, zero) for zero in zeros] for _ in range(n_rows)]
                first_value = element_address(b, values, d, N_BYTES[kind])
                with cgutils.for_range(b, n) as loop:
                    row = element_address(b, first_value, loop.index, value_stride)
                    if n_rows == 1:
                        for line in range(0, sum(widths) * N_BYTES[kind], LINE):
                            prefetch(b, b.add(b.add(row, ahead), const_i64(line)))
                    loaded_values = [
                        load_f32(context, b, row, N_BYTES[kind] * offset, kind, width)
                        for offset, width in zip(offsets, widths, strict=True)
                    ]
                    for weight_row, pointers in zip(weight_rows, sums, strict=True):
                        weight = load(b, weight_row, b.mul(loop.index, const_i64(4)), F32, 4)
                        for value, pointer in zip(loaded_values, pointers, strict=True):
                            x = splat(b, weight, value.type) if isinstance(value.type, ir.VectorType) else weight
                            b.store(b.fadd(b.load(pointer), b.fmul(x, value)), pointer)
                for i, pointers in enumerate(sums):
                    output = element_address(b, element_address(b, y, const_i64(i), y_stride), d, 4)
                    for offset, pointer in zip(offsets, pointers, strict=True):
                        store_f32(b, b.load(pointer), b.add(output, const_i64(4 * offset)))

            # As many chunks of dimensions at a time as there are registers for their sums; two in a vector if they fit.
            is_wide = has_feature(context, "avx512f")
            max_chunks = 8 if n_rows == 1 else 5 if is_wide else 3
            n_chunks = b.sdiv(D, const_i64(LANES))
            n_passes = b.sdiv(b.add(n_chunks, const_i64(max_chunks - 1)), const_i64(max_chunks))
            with cgutils.for_range(b, n_passes) as passes:
                low, high = (b.sdiv(b.mul(n_chunks, b.add(passes.index, const_i64(k))), n_passes) for k in range(2))
                for size in range(1, max_chunks + 1):
                    widths = [2 * LANES] * (size // 2) + [LANES] * (size % 2) if is_wide else [LANES] * size
                    with b.if_then(b.icmp_signed("==", b.sub(high, low), const_i64(size))):
                        add_up(b.mul(low, const_i64(LANES)), widths)
            with cgutils.for_range(b, b.srem(D, const_i64(LANES))) as dimensions:
                add_up(b.add(b.mul(n_chunks, const_i64(LANES)), dimensions.index), [1])

        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            call_separately(b, f"values_{n_rows}_{kind}", args, ir.VoidType(), functools.partial(emit, context))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return kernel


@intrinsic
def exp_and_sum(context, scores, n_blocks, lo, hi, maximum, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Replace scores (fp32, n_blocks times KEY_BLOCK) by e^((score - maximum) scale), those outside lo..hi-1 by 0.

    Returns the sum in the order of `make_reduction`: KEY_BLOCK lanes, whose halves are added.
    """

    def emit(b: Builder, args: Sequence[Value]) -> Value:
        scores, n_blocks, lo, hi, maximum, scale = args
        floats, zero = vector(F32, KEY_BLOCK), ir.Constant(vector(F32, KEY_BLOCK), [0.0] * KEY_BLOCK)
        lanes = ir.Constant(vector(I32, KEY_BLOCK), list(range(KEY_BLOCK)))
        maxima, scales = (Lanes(b, splat(b, number, floats)) for number in (maximum, scale))
        total = cgutils.alloca_once_value(b, zero)
        with cgutils.for_range(b, n_blocks) as loop:
            start = b.mul(loop.index, const_i64(KEY_BLOCK))
            bounds = [splat(b, b.trunc(b.sub(bound, start), I32), lanes.type) for bound in (lo, hi)]
            inside = b.and_(b.icmp_signed(">=", lanes, bounds[0]), b.icmp_signed("<", lanes, bounds[1]))
            score = load_lanes(b, scores, start, F32, KEY_BLOCK)
            weight = b.select(inside, exp((score - maxima) * scales).value, zero)
            b.store(b.fadd(b.load(total), weight), total)
            store_f32(b, weight, element_address(b, scores, start, 4))
        result = Lanes(b, b.load(total))
        while result.width > 1:
            result = fold(result, add)
        return result.value

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
        return call_separately(b, "exp_and_sum", args, F32, emit)

    return types.float32(*[types.int64] * 4, types.float32, types.float32), codegen


@intrinsic
def widen_f16(context, source, target, n):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Convert n fp16 numbers, a multiple of KEY_BLOCK, to fp32."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
        source, target, n = args

        def body(index: Value, width: int) -> None:
            values = load_f32(context, b, element_address(b, source, index, 2), 0, I16, width)
            store_f32(b, values, element_address(b, target, index, 4))

        emit_loops(b, n, (KEY_BLOCK,), body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def narrow_to_f16(context, source, target, n):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Convert n fp32 numbers to fp16."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
        source, target, n = args

        def body(index: Value, width: int) -> None:
            values = load_lanes(b, source, index, F32, width)
            if has_f16(context):
                bits = b.bitcast(b.fptrunc(values.value, vector(ir.HalfType(), width)), vector(I16, width))
            else:
                bits = to_f16(values).value
            address = element_address(b, target, index, 2)
            b.store(bits, b.inttoptr(address, bits.type.as_pointer()), align=2)

        emit_loops(b, n, WIDTHS, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def prefetch_to_write(context, address, n):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Fetch the cache lines of n bytes that will be written."""

    def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
        def body(index: Value, width: int) -> None:  # noqa: ARG001
            prefetch(b, b.add(args[0], index), to_write=True)

        emit_loops(b, args[1], (LINE,), body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
