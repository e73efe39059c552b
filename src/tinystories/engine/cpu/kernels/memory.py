"""How kernels see memory: arrays at raw addresses, and what one thread has for itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from numba import carray, types

from tinystories.engine.cpu.kernels.layout import CALL
from tinystories.engine.cpu.kernels.simd import make_pointer_cast
from tinystories.weights.quantize import GROUP_SIZE

# Without fastmath: LLVM must not change the order of a sum or fuse operations, as it would for some processors only.
# Python calls only the entry points, so other functions need no wrappers.
njit = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def make_view(kind: Any) -> Callable[[int, int], Any]:
    """Return a Numba function that views n numbers at an address as an array, without a copy."""
    cast_to_pointer = make_pointer_cast(kind)

    @njit
    def view(address, n):
        return carray(cast_to_pointer(address), (n,))

    return view


view_f32, view_i64, view_i32 = make_view(types.float32), make_view(types.int64), make_view(types.int32)
view_i16, view_i8 = make_view(types.int16), make_view(types.int8)
view_u16, view_u8 = make_view(types.uint16), make_view(types.uint8)


class ThreadContext(NamedTuple):
    """A piece of a phase, and the scratch (private memory) of the thread that computes it. `make_context` makes it.

    The scratch holds the input x of the next matmul, in fp32 and quantized. Memory map, for R = c[CALL.max_rows] rows
    of W = c[CALL.scratch_width] floats and groups of G = GROUP_SIZE columns:

        offset                type           elements   field
        0                     fp32           R W        x
        4 R W                 int16 or int8  R W        quantized: for int8 weights int16 (int8-a8: see
                                                        `matmul.make_row_quantizer`), for int4 weights int8
        6 R W                 fp32           R          scales: one per row (int8 weights)
        6 R W + 4 R           int32          R W / G    group_offsets: -8 times the sum of a group (int4 weights)
        6 R W + 4 R + 4 R W/G fp32           R W / G    group_scales: one per group (int4 weights)
        6 R W + 4 R + 8 R W/G fp32           2 S D      wide_kv: keys and values of a head (fp16 KV cache)

    `Workspace` in runtime.py allocates the memory: change both together. Rows are stored back to back at the width of
    the current matrix, not at W. `attention` uses `x` for the attention weights of a tile of rows. S is the context,
    rounded up to whole blocks of keys.
    """

    precision: Any  # `matmul.PrecisionKernels`
    piece: int  # which of the n_pieces shares of the phase's rows or heads
    n_pieces: int
    eps: float  # of the norms, fp32
    x: int  # address, as are the following
    quantized: int
    scales: int
    group_offsets: int
    group_scales: int
    wide_kv: int


@njit
def make_context(c, precision, eps, piece, n_pieces, thread):
    """Make the `ThreadContext` of a piece that this thread computes."""
    scratch_base = c[CALL.scratch] + thread * c[CALL.scratch_stride]
    scratch_floats = c[CALL.scratch_width] * c[CALL.max_rows]
    quantized, scales = scratch_base + 4 * scratch_floats, scratch_base + 6 * scratch_floats
    group_offsets = scales + 4 * c[CALL.max_rows]
    group_scales = group_offsets + 4 * scratch_floats // GROUP_SIZE
    wide_kv = group_scales + 4 * scratch_floats // GROUP_SIZE
    addresses = (scratch_base, quantized, scales, group_offsets, group_scales, wide_kv)
    return ThreadContext(precision, piece, n_pieces, eps, *addresses)
