"""The inner loops of the int4 matmul as LLVM IR. The layout of the weights is that of `weights.quantize`.

A product is a nibble (0..15, the weight plus 8) times a signed byte. Four of them are added at once where the target
has an instruction for it; elsewhere two (`vpmaddubsw`, which LLVM does not find, so it is called by name with AVX2).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinystories.engine.cpu.kernels.simd import (
    F32,
    I8,
    I16,
    I32,
    Builder,
    Value,
    call_intrinsic,
    call_separately,
    const_i64,
    dot_bytes,
    has_byte_dot,
    has_feature,
    load,
    madd_i16,
    prefetch,
    splat,
)
from tinystories.weights.quantize import BLOCK_ROWS, GROUP_SIZE

I8X32, I16X16, I32X16 = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 16)
I32X8 = ir.VectorType(I32, 8)
BLOCK_BYTES, SCALE_BYTES = BLOCK_ROWS * GROUP_SIZE // 2, 2 * BLOCK_ROWS  # of a group of columns of a block
# Weights and scales are two sequences, which Zen 4 reads from memory a fifth faster if they are prefetched this many
# bytes ahead; from its caches, a tenth slower.
WEIGHT_PREFETCH, SCALE_PREFETCH = 8192, 512


def maddubs(b: Builder, weights: Value, x: Value, *, avx2: bool) -> Value:
    """Multiply 32 unsigned by 32 signed bytes and add adjacent products to 16 sums, which must fit 16 bits.

    One instruction with AVX2 (`vpmaddubsw`).
    """
    if avx2:
        return call_intrinsic(b, "llvm.x86.avx2.pmadd.ub.sw", I16X16, weights, x)
    wide = ir.VectorType(I16, 32)
    products = b.mul(b.zext(weights, wide), b.sext(x, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    even, odd = (ir.Constant(I32X16, list(range(first, 32, 2))) for first in (0, 1))
    return b.add(b.shuffle_vector(products, undefined, even), b.shuffle_vector(products, undefined, odd))


def madd_ones(b: Builder, words: Value, *, avx2: bool) -> Value:
    """Add adjacent 16-bit integers to 8 32-bit sums."""
    ones = ir.Constant(I16X16, [1] * 16)
    if avx2:  # LLVM does not find the instruction by itself
        return call_intrinsic(b, "llvm.x86.avx2.pmadd.wd", I32X8, words, ones)
    return madd_i16(b, words, ones)


class TileArgs(NamedTuple):
    """Arguments of a tile, 64-bit integers: addresses unless noted."""

    w: Value  # first block
    n_groups: Value  # number
    x: Value  # first row of quantized x (8 bits)
    x_stride: Value  # bytes
    y: Value  # first output (fp32)
    y_stride: Value  # bytes
    scales: Value  # of the weights: 8 bf16 per group, block by block
    x_scales: Value  # of x: fp32 per group
    x_offsets: Value  # -8 times the sum of x, int32 per group
    group_stride: Value  # bytes from the x_scales and x_offsets of a row to those of the next
    n_tiles: Value  # number; each is the next n_rows rows of x


def make_int4_kernel(n_rows: int, n_blocks: int, *, from_memory: bool = False) -> Callable[..., None]:
    """Make the int4 matmul kernel: n_blocks blocks of 8 weight rows times tiles of n_rows rows of x.

    `from_memory`: prefetch the weights, which are not in the caches.

    The arguments are `TileArgs`. It computes y[i, :8 n_blocks] = sum over groups g of
    scales[g] * x_scales[i, g] * (w[g] . x[i, g] + x_offsets[i, g]) with the stored weights w in 0..15 (value + 8). The
    order of summation depends on no shape.
    """

    @intrinsic
    def kernel(context, w, n_groups, x, x_stride, y, y_stride, scales, x_scales, x_offsets, group_stride, n_tiles):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, values: Any) -> Value:
            args = TileArgs(*values)
            is_wide = has_byte_dot(context) and has_feature(context, "avx512bw")  # 32 registers of 16 sums
            blocks, rows = (n_blocks if is_wide else 1), (n_rows if is_wide else min(n_rows, 4))

            def emit(b: Builder, values: Sequence[Value]) -> None:
                args = TileArgs(*values)
                with cgutils.for_range(b, b.mul(args.n_tiles, const_i64(n_rows // rows))) as loop:
                    tile_args = skip_rows(b, args, b.mul(loop.index, const_i64(rows)))
                    emit_tile(context, b, tile_args, rows, blocks, from_memory=from_memory)

            for block in range(0, n_blocks, blocks):
                groups = b.mul(args.n_groups, const_i64(block))
                part = args._replace(
                    w=b.add(args.w, b.mul(groups, const_i64(BLOCK_BYTES))),
                    y=b.add(args.y, const_i64(4 * BLOCK_ROWS * block)),
                    scales=b.add(args.scales, b.mul(groups, const_i64(SCALE_BYTES))),
                )
                if n_rows == 1:  # many short calls
                    emit(b, part)
                else:
                    call_separately(b, f"int4_tiles_{n_rows}x{n_blocks}", part, ir.VoidType(), emit)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(TileArgs._fields)), codegen

    return kernel


def skip_rows(b: Builder, args: TileArgs, n: Value) -> TileArgs:
    """Return the arguments of a tile n rows of x later."""
    groups = b.mul(args.group_stride, n)
    return args._replace(
        x=b.add(args.x, b.mul(args.x_stride, n)),
        y=b.add(args.y, b.mul(args.y_stride, n)),
        x_scales=b.add(args.x_scales, groups),
        x_offsets=b.add(args.x_offsets, groups),
    )


def load_blocks(b: Builder, address: Value, block_bytes: Value, n_blocks: int, kind: Value) -> Value:
    """Load a vector of type `kind` from each of 1 or 2 blocks, next to each other."""
    first = load(b, address, const_i64(0), kind, 1)
    if n_blocks == 1:
        return first
    second = load(b, address, block_bytes, kind, 1)
    n = 2 * kind.count
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, n), list(range(n))))


def emit_tile(
    context: Any, b: Builder, args: TileArgs, n_rows: int, n_blocks: int, *, from_memory: bool = False
) -> None:
    """Multiply n_rows rows of x by 1 or 2 blocks. Products of a group that are summed in 16 bits do not overflow.

    15 * 127 * 2 * 8 < 2^15.
    """
    avx2, byte_dot, lanes = has_feature(context, "avx2"), has_byte_dot(context), BLOCK_ROWS * n_blocks
    integers, floats, nibble_type = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes), ir.VectorType(I8, 4 * lanes)
    x_rows, scale_rows, offset_rows = (
        [b.add(address, b.mul(stride, const_i64(i))) for i in range(n_rows)]
        for address, stride in (
            (args.x, args.x_stride),
            (args.x_scales, args.group_stride),
            (args.x_offsets, args.group_stride),
        )
    )
    block_bytes, scale_bytes = (b.mul(args.n_groups, const_i64(n)) for n in (BLOCK_BYTES, SCALE_BYTES))
    totals = [cgutils.alloca_once_value(b, ir.Constant(floats, None)) for _ in x_rows]
    # Per group: load 4 x 32 bytes of weights, multiply the low and the high nibbles by 4 columns of x each.
    low_nibble_mask, nibble_shift = (ir.Constant(nibble_type, [value] * 4 * lanes) for value in (15, 4))
    with cgutils.for_range(b, args.n_groups) as loop:
        group, x_group = (b.mul(loop.index, const_i64(n)) for n in (4, GROUP_SIZE))
        w = b.add(args.w, b.mul(loop.index, const_i64(BLOCK_BYTES)))
        sums_32 = [splat(b, load(b, row, group, I32, 4), integers) for row in offset_rows]
        sums_16 = [ir.Constant(I16X16, None) for _ in x_rows]
        for step in range(4):
            nibbles = load_blocks(b, b.add(w, const_i64(32 * step)), block_bytes, n_blocks, I8X32)
            for half, weights in enumerate((b.and_(nibbles, low_nibble_mask), b.lshr(nibbles, nibble_shift))):
                for i, row in enumerate(x_rows):
                    four = load(b, row, b.add(x_group, const_i64(GROUP_SIZE // 2 * half + 4 * step)), I32, 1)
                    x = b.bitcast(splat(b, four, integers), nibble_type)
                    if byte_dot:
                        sums_32[i] = dot_bytes(b, sums_32[i], weights, x)
                    else:
                        sums_16[i] = b.add(sums_16[i], maddubs(b, weights, x, avx2=avx2))
        address = b.add(args.scales, b.mul(loop.index, const_i64(SCALE_BYTES)))
        if from_memory:  # the two cache lines of a group's weights, and its scales
            for base, ahead in ((w, WEIGHT_PREFETCH), (w, WEIGHT_PREFETCH + 64), (address, SCALE_PREFETCH)):
                prefetch(b, b.add(base, const_i64(ahead)))
        scale_bits = b.zext(load_blocks(b, address, scale_bytes, n_blocks, ir.VectorType(I16, BLOCK_ROWS)), integers)
        scales = b.bitcast(b.shl(scale_bits, ir.Constant(integers, [16] * lanes)), floats)
        for i, (pointer, row) in enumerate(zip(totals, scale_rows, strict=True)):
            group_sum = sums_32[i] if byte_dot else b.add(madd_ones(b, sums_16[i], avx2=avx2), sums_32[i])
            combined_scale = b.fmul(scales, splat(b, load(b, row, group, F32, 4), floats))
            scaled = b.fmul(b.sitofp(group_sum, floats), combined_scale, flags=["contract"])
            b.store(b.fadd(b.load(pointer), scaled, flags=["contract"]), pointer)
    for i, pointer in enumerate(totals):
        y = b.add(args.y, b.mul(args.y_stride, const_i64(i)))
        b.store(b.load(pointer), b.inttoptr(y, floats.as_pointer()), align=4)
