"""SIMD inner loops of attention as LLVM IR: scores of queries and keys, and weighted sums of values.

Keys and values are rows of D numbers, fp32 or fp16. Every result is computed in the same order whatever the number of
rows in a tile and the processor: a score has 8 partial sums, over dimensions d = 0..7 modulo 8, whose halves are added
three times; a weighted sum adds one position after the other.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinystories.engine.cpu.kernels.elementwise import from_f16
from tinystories.engine.cpu.kernels.lanes import N_BYTES, Lanes, vector
from tinystories.engine.cpu.kernels.simd import (
    F32,
    F32X8,
    I32,
    Builder,
    Value,
    const_i64,
    has_feature,
    horizontal_sum,
    is_arm64,
    load,
    splat,
)

LANES = 8


def load_f32(context: Any, b: Builder, address: Value, offset: int, kind: Value, width: int) -> Value:
    """Load `width` numbers of type `kind` (fp32, or fp16 as I16) from address + offset (bytes), converted to fp32."""
    value = load(b, address, const_i64(offset), vector(kind, width), N_BYTES[kind])
    if kind == F32:
        return value
    if is_arm64(context) or has_feature(context, "f16c"):
        return b.fpext(b.bitcast(value, vector(ir.HalfType(), width)), vector(F32, width))
    return from_f16(Lanes(b, value)).value  # LLVM would call a function for each number


def element_address(b: Builder, address: Value, index: Value, stride: Value | int) -> Value:
    """Return address + index * stride."""
    return b.add(address, b.mul(index, const_i64(stride) if isinstance(stride, int) else stride))


def store_f32(b: Builder, value: Value, address: Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=4)


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


def make_score_kernel(n_queries: int, n_keys: int, kind: Value) -> Callable[..., None]:
    """Make the kernel of scores[i, s] = q[i] . keys[s], n_queries by n_keys at a time: 8 scores, or 1.

    Arguments, addresses unless noted: queries (fp32), their stride (bytes), keys of type `kind`, number of keys, at
    least n_keys, scores (fp32), their stride (bytes), D (number).
    """
    assert n_queries * n_keys in (1, LANES)

    @intrinsic
    def kernel(context, q, q_stride, keys, n, scores, score_stride, D):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            q, q_stride, keys, n, scores, score_stride, D = args
            key_stride = b.mul(D, const_i64(N_BYTES[kind]))
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
                        load_f32(context, b, element_address(b, row, offset, N_BYTES[kind]), 0, kind, LANES)
                        for row in key_rows
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
                            key = load_f32(context, b, element_address(b, row, d, N_BYTES[kind]), 0, kind, 1)
                            total = b.fadd(load(b, output, const_i64(4 * j), F32, 4), b.fmul(x, key))
                            store_f32(b, total, b.add(output, const_i64(4 * j)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return kernel


def make_value_kernel(n_rows: int, kind: Value) -> Callable[..., None]:
    """Make the kernel of y[i] = sum over positions s of weights[i, s] * values[s], for n_rows rows of weights.

    Arguments, addresses unless noted: weights (fp32), their stride (bytes), values of type `kind`, number of positions,
    y (fp32), its stride (bytes), D (number).
    """

    @intrinsic
    def kernel(context, weights, weight_stride, values, n, y, y_stride, D):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            weights, weight_stride, values, n, y, y_stride, D = args
            weight_rows = [element_address(b, weights, const_i64(i), weight_stride) for i in range(n_rows)]
            value_stride = b.mul(D, const_i64(N_BYTES[kind]))

            def add_up(d: Value, n_vectors: int, width: int) -> None:
                """Compute n_vectors * width dimensions from d on."""
                zero = ir.Constant(vector(F32, width), [0.0] * width if width > 1 else 0.0)
                sums = [[cgutils.alloca_once_value(b, zero) for _ in range(n_vectors)] for _ in range(n_rows)]
                first_value = element_address(b, values, d, N_BYTES[kind])
                with cgutils.for_range(b, n) as loop:
                    row = element_address(b, first_value, loop.index, value_stride)
                    loaded_values = [
                        load_f32(context, b, row, N_BYTES[kind] * width * v, kind, width) for v in range(n_vectors)
                    ]
                    for weight_row, pointers in zip(weight_rows, sums, strict=True):
                        weight = load(b, weight_row, b.mul(loop.index, const_i64(4)), F32, 4)
                        weight = splat(b, weight, vector(F32, width)) if width > 1 else weight
                        for value, pointer in zip(loaded_values, pointers, strict=True):
                            b.store(b.fadd(b.load(pointer), b.fmul(weight, value)), pointer)
                for i, pointers in enumerate(sums):
                    output = element_address(b, element_address(b, y, const_i64(i), y_stride), d, 4)
                    for v, pointer in enumerate(pointers):
                        store_f32(b, b.load(pointer), b.add(output, const_i64(4 * width * v)))

            # As many vectors of dimensions at a time as there are registers for their sums.
            max_vectors = 8 if n_rows == 1 else 5 if has_feature(context, "avx512f") else 3
            n_chunks = b.sdiv(D, const_i64(LANES))
            n_passes = b.sdiv(b.add(n_chunks, const_i64(max_vectors - 1)), const_i64(max_vectors))
            with cgutils.for_range(b, n_passes) as passes:
                low, high = (b.sdiv(b.mul(n_chunks, b.add(passes.index, const_i64(k))), n_passes) for k in range(2))
                for n_vectors in range(1, max_vectors + 1):
                    with b.if_then(b.icmp_signed("==", b.sub(high, low), const_i64(n_vectors))):
                        add_up(b.mul(low, const_i64(LANES)), n_vectors, LANES)
            with cgutils.for_range(b, b.srem(D, const_i64(LANES))) as dimensions:
                add_up(b.add(b.mul(n_chunks, const_i64(LANES)), dimensions.index), 1, 1)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return kernel
