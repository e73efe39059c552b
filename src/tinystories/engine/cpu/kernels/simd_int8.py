"""The inner loops of the int8 matmul as LLVM IR: tiles of sums that stay in registers, in a shape for each processor.

Weights are 8-bit and activations 16-bit integers, or with int8-a8 8-bit ones, and 32-bit sums of their products are
exact (`matmul.make_row_quantizer`), so every tile and every processor computes the same sums. A block of weights is 16
rows; the layout is that of `weights.quantize`: a step of 4 columns is 64 bytes, two pairs of columns of 32 bytes each.
"""

from collections.abc import Callable
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
    I64,
    Builder,
    Value,
    call_intrinsic,
    const_i64,
    dot_bytes,
    has_byte_dot,
    has_feature,
    is_x86,
    load,
    madd_i16,
    prefetch,
    splat,
)
from tinystories.weights.quantize import INT8_BLOCK_ROWS

STEP_BYTES = 4 * INT8_BLOCK_ROWS  # 4 columns of a block
MIN_SUMS = 8  # independent sums in a loop: fewer would wait for the latency of a multiplication
# A single row of x reads all blocks in a sequence. These processors are faster if it prefetches this many bytes ahead;
# Zen 4 is 9 to 12% slower (docs/log.md).
ROW_PREFETCH, PREFETCHING_PROCESSORS = 8192, ("znver5",)


class Tiling(NamedTuple):
    """The largest tile of a processor, so that its sums, weights and activations fit the vector registers."""

    lanes: int  # 32-bit sums in a vector
    n_rows: int  # of x
    n_vectors: int  # of sums for each row of x
    tile: "type[MaddTile | DotTile | ByteTile]"


class TileArgs(NamedTuple):
    """Arguments of a tile, 64-bit integers."""

    w: Value  # address of the first weight
    block_bytes: Value  # from one block of weights to the next
    n_steps: Value  # columns / 4, rounded up
    x: Value  # address of the first row of quantized x
    x_stride: Value  # bytes
    y: Value  # address of the first output (fp32)
    y_stride: Value  # bytes
    scales: Value  # address of the scales of the weight rows (fp32)
    x_scales: Value  # address of the scales of the rows of x (fp32)
    prefetch: Value | None  # bytes from the first weights in use to those to prefetch; 0 or None for none
    spread: Value  # 2^spread tiles share the lines to prefetch: each step of a tile prefetches line step >> spread


def select_tiling(context: Any, x_bits: int) -> Tiling:
    """Return the tiling for x of 16 or 8 bits and the target that the code is compiled for, from its features."""
    if x_bits == 8 and has_byte_dot(context):
        if has_feature(context, "dotprod"):
            return Tiling(4, 4, 4, ByteTile)
        return Tiling(16, 8, 2, ByteTile) if has_feature(context, "avx512bw") else Tiling(8, 4, 2, ByteTile)
    if has_feature(context, "dotprod"):
        return Tiling(4, 4, 2, DotTile)
    if has_feature(context, "avx512bw"):
        return Tiling(16, 8, 2, MaddTile)
    if has_feature(context, "avx2"):
        return Tiling(8, 4, 2, MaddTile)
    return Tiling(4, 4, 2, MaddTile)


@intrinsic
def multiplies_bytes(context):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Return whether x of 8 bits is stored as bytes, because the target multiplies them; else as 16-bit integers."""
    return types.boolean(), lambda context, b, _, args: ir.Constant(ir.IntType(1), has_byte_dot(context))  # noqa: ARG005


def make_int8_kernel(n_rows: int, n_blocks: int, x_bits: int) -> Callable[..., None]:
    """Make the kernel that multiplies n_blocks blocks of weights by n_rows rows of x, of 16 or 8 bits.

    It computes y[i, :16 n_blocks] = (w . x[i]) * (scales * x_scales[i]). The arguments are `TileArgs`.
    """

    @intrinsic
    def kernel(context, w, block_bytes, n_steps, x, x_stride, y, y_stride, scales, x_scales, prefetch, spread):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, values: Any) -> Value:
            emit_block_tiles(b, select_tiling(context, x_bits), TileArgs(*values), n_rows, n_blocks)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(TileArgs._fields)), codegen

    return kernel


def make_int8_row_kernel(x_bits: int) -> Callable[..., None]:
    """Make the kernel that multiplies n_blocks adjacent blocks of weights by one row of x, of 16 or 8 bits.

    The other arguments are as in `TileArgs`.
    """

    @intrinsic
    def kernel(context, n_blocks, w, block_bytes, n_steps, x, x_stride, y, y_stride, scales, x_scales):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, b: Builder, _: Any, values: Any) -> Value:
            n_blocks, *addresses = values
            _, processor, _ = context.codegen().magic_tuple()
            prefetch = const_i64(ROW_PREFETCH) if processor in PREFETCHING_PROCESSORS else None
            args, n_outputs = TileArgs._make([*addresses, prefetch, const_i64(0)]), INT8_BLOCK_ROWS
            tiling = select_tiling(context, x_bits)
            with cgutils.for_range(b, n_blocks) as loop:
                outputs = b.mul(loop.index, const_i64(4 * n_outputs))
                block = args._replace(
                    w=b.add(args.w, b.mul(args.block_bytes, loop.index)),
                    y=b.add(args.y, outputs),
                    scales=b.add(args.scales, outputs),
                )
                emit_tile(b, tiling, block, 1, n_outputs // tiling.lanes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return kernel


def emit_block_tiles(b: Builder, tiling: Tiling, args: TileArgs, n_rows: int, n_blocks: int) -> None:
    """Cover n_rows rows of x and n_blocks blocks with calls of tiles that the processor has registers for."""
    n_outputs, rows = INT8_BLOCK_ROWS * n_blocks, min(n_rows, tiling.n_rows)
    width = min(n_outputs, tiling.n_vectors * tiling.lanes)
    tile = tile_function(b.module, tiling, rows, width // tiling.lanes)
    for first_output in range(0, n_outputs, width):
        block, row_in_block = divmod(first_output, INT8_BLOCK_ROWS)
        w = b.add(args.w, b.add(b.mul(args.block_bytes, const_i64(block)), const_i64(2 * row_in_block)))
        for first_row in range(0, n_rows, rows):
            part = args._replace(
                w=w,
                x=b.add(args.x, b.mul(args.x_stride, const_i64(first_row))),
                y=b.add(args.y, b.add(b.mul(args.y_stride, const_i64(first_row)), const_i64(4 * first_output))),
                scales=b.add(args.scales, const_i64(4 * first_output)),
                x_scales=b.add(args.x_scales, const_i64(4 * first_row)),
                prefetch=args.prefetch if first_row == 0 else const_i64(0),
            )
            b.call(tile, part)


def tile_function(module: Any, tiling: Tiling, n_rows: int, n_vectors: int) -> Value:
    """Return the function of a tile, whose arguments are `TileArgs`; add it to the module if it is not there yet."""
    name = f"int8_{tiling.tile.__name__}_{n_rows}x{n_vectors}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(TileArgs._fields)), name)
    function.linkage = "internal"
    function.attributes.add("noinline")  # the registers are the tile's own
    b = ir.IRBuilder(function.append_basic_block())
    emit_tile(b, tiling, TileArgs(*function.args), n_rows, n_vectors)
    b.ret_void()
    return function


def emit_tile(b: Builder, tiling: Tiling, args: TileArgs, n_rows: int, n_vectors: int) -> None:
    """Multiply n_rows rows of x by n_vectors vectors of outputs and store the scaled sums."""
    tile = tiling.tile(b, args, n_rows, n_vectors, tiling.lanes)
    # Few sums are split into several each, which are added up at the end.
    n_unrolled = max(1, tile.n_chains // tile.chains_per_step)
    n_iterations = b.udiv(args.n_steps, const_i64(n_unrolled))
    with cgutils.for_range(b, n_iterations) as loop:
        first = b.mul(loop.index, const_i64(n_unrolled))
        for i in range(n_unrolled):
            tile.emit_step(b.add(first, const_i64(i)), tile.chains_per_step * i)
    if n_unrolled > 1:
        rest = b.mul(n_iterations, const_i64(n_unrolled))
        with cgutils.for_range_slice(b, rest, args.n_steps, const_i64(1)) as (step, _):
            tile.emit_step(step, 0)
    lanes, vector = tiling.lanes, ir.VectorType(F32, tiling.lanes)
    scales = [load(b, args.scales, const_i64(4 * lanes * v), vector, 4) for v in range(n_vectors)]
    for i in range(n_rows):
        x_scale = splat(b, load(b, args.x_scales, const_i64(4 * i), F32, 4), vector)
        y = b.add(args.y, b.mul(args.y_stride, const_i64(i)))
        for v in range(n_vectors):
            values = b.fmul(b.sitofp(tile.emit_total(i, v), vector), b.fmul(scales[v], x_scale))
            pointer = b.inttoptr(b.add(y, const_i64(4 * lanes * v)), vector.as_pointer())
            b.store(values, pointer, align=4)


class Tile:
    """The sums of n_rows rows of x and n_vectors vectors of outputs, while a tile is emitted.

    A sum is kept in `n_chains` parts, so that an addition need not wait for the previous one. A step adds to
    `chains_per_step` of them.
    """

    chains_per_step = 2

    def __init__(self, b: Builder, args: TileArgs, n_rows: int, n_vectors: int, lanes: int) -> None:
        self.b, self.args, self.n_rows, self.n_vectors, self.lanes = b, args, n_rows, n_vectors, lanes
        self.x_rows = [b.add(args.x, b.mul(args.x_stride, const_i64(i))) for i in range(n_rows)]
        self.n_chains = max(1, MIN_SUMS // (n_rows * n_vectors))
        self.sums = [[self.zeros(self.n_chains) for _ in range(n_vectors)] for _ in range(n_rows)]

    def zeros(self, n: int) -> list[Value]:
        """Return n variables of the type of a vector of sums, set to 0."""
        zero = ir.Constant(ir.VectorType(I32, self.lanes), None)
        return [cgutils.alloca_once_value(self.b, zero) for _ in range(n)]

    def load_weights(self, step: Value, pair: int, first_output: int, n_outputs: int) -> Value:
        """Load a pair of columns of n_outputs adjacent rows of a block, and prefetch those of a later block."""
        b, (block, row) = self.b, divmod(first_output, INT8_BLOCK_ROWS)
        base = b.add(self.args.w, b.mul(self.args.block_bytes, const_i64(block)))
        offset = b.add(b.mul(step, const_i64(STEP_BYTES)), const_i64(STEP_BYTES // 2 * pair + 2 * row))
        if pair == 0 and row == 0 and self.args.prefetch is not None:
            line = b.mul(b.lshr(step, self.args.spread), const_i64(STEP_BYTES))
            prefetch(b, b.add(b.add(base, line), self.args.prefetch))
        return load(b, base, offset, ir.VectorType(I8, 2 * n_outputs), 1)

    def accumulate(self, pointer: Value, add: Callable[[Value], Value]) -> None:
        """Replace a vector of sums by `add` of it."""
        self.b.store(add(self.b.load(pointer)), pointer)

    def emit_total(self, i: int, v: int) -> Value:
        """Return the vector of sums of row i of x and vector v of outputs."""
        total, *rest = [self.b.load(pointer) for pointer in self.sums[i][v]]
        for part in rest:
            total = self.b.add(total, part)
        return total


class MaddTile(Tile):
    """Weights are widened to 16 bits; an instruction multiplies pairs of 16-bit integers and adds the products.

    LLVM finds `vpdpwssd` (with VNNI), `vpmaddwd` and `pmaddwd` on x86. ARM has no such instruction: there, even and odd
    columns are multiplied one after the other (`smlal`).
    """

    def emit_step(self, step: Value, chain: int) -> None:
        """Multiply 4 columns; `chain` is the part of the sums for the first two."""
        b, wide = self.b, ir.VectorType(I16, 2 * self.lanes)
        for pair in range(2):
            weights = [self.load_weights(step, pair, self.lanes * v, self.lanes) for v in range(self.n_vectors)]
            weights = [b.sext(w, wide) for w in weights]
            part = (chain + pair) % self.n_chains
            for row, sums in zip(self.x_rows, self.sums, strict=True):
                offset = b.add(b.mul(step, const_i64(8)), const_i64(4 * pair))
                x = b.bitcast(splat(b, load(b, row, offset, I32, 4), ir.VectorType(I32, self.lanes)), wide)
                for w, parts in zip(weights, sums, strict=True):
                    self.accumulate(parts[part], lambda total, w=w, x=x: b.add(total, madd_i16(b, w, x)))  # type: ignore[misc]


class ByteTile(Tile):
    """x has 8 bits: an instruction multiplies 4 bytes and adds the products.

    On x86 one of the factors is unsigned, so 128 is added to the weights. The sums are corrected by -128 times the sum
    of x, which follows the bytes of a row, in the second half of its memory.
    """

    chains_per_step = 1

    def emit_step(self, step: Value, chain: int) -> None:
        """Multiply 4 columns; `chain` is the part of the sums."""
        b, quads, integers = self.b, self.load_quads(step), ir.VectorType(I32, self.lanes)
        if is_x86(b):
            quads = [b.xor(quad, ir.Constant(quad.type, [-128] * quad.type.count)) for quad in quads]
        for row, sums in zip(self.x_rows, self.sums, strict=True):
            x = b.bitcast(splat(b, load(b, row, b.mul(step, const_i64(4)), I32, 4), integers), quads[0].type)
            for w, parts in zip(quads, sums, strict=True):
                self.accumulate(parts[chain % self.n_chains], lambda total, w=w, x=x: dot_bytes(b, total, w, x))  # type: ignore[misc]

    def load_quads(self, step: Value) -> list[Value]:
        """Load 4 columns of all outputs, which are whole blocks, so that the 4 bytes of a row are adjacent."""
        b, n, quads = self.b, INT8_BLOCK_ROWS, []
        for first_output in range(0, self.n_vectors * self.lanes, n):
            both_pairs = self.load_weights(step, 0, first_output, 2 * n)  # the second follows the first
            words = b.bitcast(both_pairs, ir.VectorType(I16, 2 * n))
            for first_row in range(0, n, self.lanes):
                order = [i for k in range(first_row, first_row + self.lanes) for i in (k, k + n)]
                quad = b.shuffle_vector(words, words, ir.Constant(ir.VectorType(I32, len(order)), order))
                quads.append(b.bitcast(quad, ir.VectorType(I8, 4 * self.lanes)))
        return quads

    def emit_total(self, i: int, v: int) -> Value:
        """Return the vector of sums of row i of x and vector v of outputs."""
        b, total = self.b, super().emit_total(i, v)
        if not is_x86(b):
            return total
        offset = load(b, self.x_rows[i], b.lshr(self.args.x_stride, const_i64(1)), I32, 4)
        return b.add(total, splat(b, offset, total.type))


class DotTile(Tile):
    """ARM's `sdot` multiplies 4 signed bytes and adds the products, so x is cut into two bytes: x = 256 h + l + 128.

    h = x >> 8 and l = (x & 255) - 128 are signed bytes for every 16-bit x. So w . x = 256 w . h + w . l + 128 w . 1,
    and the sums of the weights, w . 1, are computed beside the others, once for all rows of x.
    """

    def __init__(self, b: Builder, args: TileArgs, n_rows: int, n_vectors: int, lanes: int) -> None:
        super().__init__(b, args, n_rows, n_vectors, lanes)
        self.n_chains = 2  # the sums of h and of l
        self.sums = [[self.zeros(2) for _ in range(n_vectors)] for _ in range(n_rows)]
        self.weight_sums = self.zeros(n_vectors)

    def emit_step(self, step: Value, chain: int) -> None:  # noqa: ARG002
        """Multiply 4 columns."""
        b, quads = self.b, [w for v in range(0, self.n_vectors, 2) for w in self.load_quads(step, v)]
        for w, pointer in zip(quads, self.weight_sums, strict=True):
            self.dot(pointer, w, ir.Constant(ir.VectorType(I8, 16), [1] * 16))
        for row, sums in zip(self.x_rows, self.sums, strict=True):
            x = load(b, row, b.mul(step, const_i64(8)), ir.VectorType(I8, 8), 4)
            h = b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, 16), [1, 3, 5, 7] * 4))
            l = b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, 16), [0, 2, 4, 6] * 4))  # noqa: E741
            l = b.xor(l, ir.Constant(ir.VectorType(I8, 16), [-128] * 16))  # noqa: E741
            for w, (high, low) in zip(quads, sums, strict=True):
                self.dot(high, w, h)
                self.dot(low, w, l)

    def load_quads(self, step: Value, v: int) -> tuple[Value, Value]:
        """Load 4 columns of the 8 rows of vectors v and v + 1, so that the 4 bytes of a row are adjacent."""
        b, pairs = self.b, ir.VectorType(I16, 8)
        first, second = (b.bitcast(self.load_weights(step, p, self.lanes * v, 2 * self.lanes), pairs) for p in (0, 1))
        orders = [[i for k in range(first_row, first_row + 4) for i in (k, k + 8)] for first_row in (0, 4)]
        masks = [ir.Constant(ir.VectorType(I32, 8), order) for order in orders]
        low, high = (b.bitcast(b.shuffle_vector(first, second, mask), ir.VectorType(I8, 16)) for mask in masks)
        return low, high

    def dot(self, pointer: Value, w: Value, x: Value) -> None:
        """Add the dot products of 4 times 4 bytes to a vector of sums."""
        name, vector = "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(I32, 4)
        self.accumulate(pointer, lambda total: call_intrinsic(self.b, name, vector, total, w, x))

    def emit_total(self, i: int, v: int) -> Value:
        """Return the vector of sums of row i of x and vector v of outputs."""
        b = self.b
        high, low, weights = (b.load(pointer) for pointer in (*self.sums[i][v], self.weight_sums[v]))
        eight, seven = (ir.Constant(ir.VectorType(I32, self.lanes), [n] * self.lanes) for n in (8, 7))
        return b.add(b.add(b.shl(high, eight), low), b.shl(weights, seven))
