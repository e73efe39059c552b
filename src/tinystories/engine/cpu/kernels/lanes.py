"""Loops over rows of numbers as LLVM vectors of a fixed width, written as functions of `Lanes`.

Numba's own loops are vectorized only if LLVM can prove that it may, and their sums have as many lanes as the processor
has. Here the width and the order of every operation are fixed, and a multiplication is never fused with an addition: so
every processor computes the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinystories.engine.cpu.kernels.simd import F32, I8, I16, I32, Builder, Value, const_i64, load, splat

WIDTHS = (16, 4, 1)  # lanes of the main loop, and of those for what is left of a row
N_BYTES = {F32: 4, I32: 4, I16: 2, I8: 1}


def vector(kind: Value, width: int) -> Value:
    """Return the type of `width` lanes: a scalar's if there is one."""
    return kind if width == 1 else ir.VectorType(kind, width)


class Lanes:
    """One value or a vector of them (fp32 or integers) while LLVM IR is built; operators emit its instructions.

    Numbers become constants. Integers are signed; `>>` fills with zeros.
    """

    def __init__(self, b: Builder, value: Value) -> None:
        self.b, self.value = b, value

    @property
    def width(self) -> int:
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        return getattr(self.value.type, "element", self.value.type) == F32

    def constant(self, number: float) -> Value:
        """Return a constant of this type; floats are rounded to fp32."""
        kind = self.value.type
        rounded = float(np.float32(number)) if self.is_float else int(number)
        return ir.Constant(kind, [rounded] * self.width if self.width > 1 else rounded)

    def operand(self, other: "Lanes | float") -> Value:
        return other.value if isinstance(other, Lanes) else self.constant(other)

    def emit(self, float_name: str, int_name: str, left: Value, right: Value) -> "Lanes":
        return Lanes(self.b, getattr(self.b, float_name if self.is_float else int_name)(left, right))

    def __add__(self, other: "Lanes | float") -> "Lanes":
        return self.emit("fadd", "add", self.value, self.operand(other))

    def __sub__(self, other: "Lanes | float") -> "Lanes":
        return self.emit("fsub", "sub", self.value, self.operand(other))

    def __mul__(self, other: "Lanes | float") -> "Lanes":
        return self.emit("fmul", "mul", self.value, self.operand(other))

    def __truediv__(self, other: "Lanes | float") -> "Lanes":
        return Lanes(self.b, self.b.fdiv(self.value, self.operand(other)))

    def __neg__(self) -> "Lanes":
        return Lanes(self.b, self.b.fneg(self.value))

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.b, self.b.and_(self.value, self.operand(other)))

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.b, self.b.or_(self.value, self.operand(other)))

    def __xor__(self, other: "Lanes | int") -> "Lanes":
        return Lanes(self.b, self.b.xor(self.value, self.operand(other)))

    def __lshift__(self, n: int) -> "Lanes":
        return Lanes(self.b, self.b.shl(self.value, self.constant(n)))

    def __rshift__(self, n: int) -> "Lanes":
        return Lanes(self.b, self.b.lshr(self.value, self.constant(n)))

    def __lt__(self, other: "Lanes | float") -> "Lanes":
        compare = self.b.fcmp_ordered if self.is_float else self.b.icmp_signed
        return Lanes(self.b, compare("<", self.value, self.operand(other)))

    def __gt__(self, other: "Lanes | float") -> "Lanes":
        compare = self.b.fcmp_ordered if self.is_float else self.b.icmp_signed
        return Lanes(self.b, compare(">", self.value, self.operand(other)))

    def sign_mask(self) -> "Lanes":
        """Return -1 for negative integers, otherwise 0."""
        return Lanes(self.b, self.b.ashr(self.value, self.constant(31)))

    def bits(self) -> "Lanes":
        """Return the bits of fp32 values as 32-bit integers."""
        return Lanes(self.b, self.b.bitcast(self.value, vector(I32, self.width)))

    def as_float(self) -> "Lanes":
        """Return the fp32 values that have these bits."""
        return Lanes(self.b, self.b.bitcast(self.value, vector(F32, self.width)))

    def truncate(self, kind: Value) -> "Lanes":
        """Keep the low bits of integers, as the shorter type `kind`."""
        return Lanes(self.b, self.b.trunc(self.value, vector(kind, self.width)))

    def widen(self) -> "Lanes":
        """Extend signed integers to 32 bits."""
        return Lanes(self.b, self.b.sext(self.value, vector(I32, self.width)))

    def widen_unsigned(self) -> "Lanes":
        """Extend unsigned integers to 32 bits."""
        return Lanes(self.b, self.b.zext(self.value, vector(I32, self.width)))


def select(condition: Lanes, a: Lanes | float, b: Lanes | float) -> Lanes:
    """Return a where the condition holds, otherwise b. At least one of them is not a number."""
    example = a if isinstance(a, Lanes) else b
    assert isinstance(example, Lanes)
    return Lanes(example.b, example.b.select(condition.value, example.operand(a), example.operand(b)))


def emit_loops(b: Builder, n: Value, widths: Sequence[int], body: Callable[[Value, int], None]) -> None:
    """Emit body(index of the first lane, width) for n numbers: as many as fit of each width in turn."""
    start = const_i64(0)
    for width in widths:
        count = b.sdiv(b.sub(n, start), const_i64(width))
        with cgutils.for_range(b, count) as loop:
            body(b.add(start, b.mul(loop.index, const_i64(width))), width)
        start = b.add(start, b.mul(count, const_i64(width)))


def load_lanes(b: Builder, address: Value, index: Value, kind: Value, width: int) -> Lanes:
    """Load `width` adjacent numbers of an array from `index` on."""
    offset = b.mul(index, const_i64(N_BYTES[kind]))
    return Lanes(b, load(b, address, offset, vector(kind, width), N_BYTES[kind]))


def splat_lanes(b: Builder, scalars: Sequence[Value], width: int) -> list[Lanes]:
    return [Lanes(b, splat(b, scalar, vector(F32, width)) if width > 1 else scalar) for scalar in scalars]


def make_elementwise(function: Callable[..., Any]) -> Callable[..., None]:
    """Make a Numba function that computes outputs[i] = function(*inputs[i], *scalars) for rows of n numbers.

    It takes (tuple of addresses of the outputs, tuple of addresses of the inputs, n, tuple of fp32 scalars). Inputs are
    fp32; `function` takes and returns `Lanes` (a tuple for several outputs), whose type is that of the output. An
    output may be one of the inputs; otherwise they must not overlap.
    """

    @intrinsic
    def kernel(context, outputs, inputs, n, scalars):  # type: ignore[no-untyped-def]  # noqa: ARG001
        assert all(scalar == types.float32 for scalar in scalars), scalars

        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:
            output_addresses, input_addresses = (cgutils.unpack_tuple(b, arg) for arg in args[:2])
            scalar_values = cgutils.unpack_tuple(b, args[3])

            def body(index: Value, width: int) -> None:
                loaded = [load_lanes(b, address, index, F32, width) for address in input_addresses]
                results = function(*loaded, *splat_lanes(b, scalar_values, width))
                for address, result in zip(
                    output_addresses, results if isinstance(results, tuple) else (results,), strict=True
                ):
                    kind = result.value.type
                    n_bytes = N_BYTES[getattr(kind, "element", kind)]
                    pointer = b.inttoptr(b.add(address, b.mul(index, const_i64(n_bytes))), kind.as_pointer())
                    b.store(result.value, pointer, align=n_bytes)

            emit_loops(b, args[2], WIDTHS, body)
            return context.get_dummy_value()

        return types.void(outputs, inputs, types.int64, scalars), codegen

    return kernel


def make_reduction(
    function: Callable[..., Lanes], combine: Callable[[Lanes, Lanes], Lanes], initial: float, kind: Value = F32
) -> Callable[..., Any]:
    """Make a Numba function that combines function(x[i], *scalars) over a row x of n numbers of type `kind`.

    It takes (address of x, n, tuple of fp32 scalars). The order is the same on every processor: 16 lanes, which are
    folded to 4, further ones of what is left, folded to 1, and the remaining numbers one by one.
    """

    result_kind = F32 if isinstance(initial, float) else I32

    @intrinsic
    def kernel(context, x, n, scalars):  # type: ignore[no-untyped-def]  # noqa: ARG001
        assert all(scalar == types.float32 for scalar in scalars), scalars

        def codegen(context: Any, b: Builder, _: Any, args: Any) -> Value:  # noqa: ARG001
            x, n, scalar_values = args[0], args[1], cgutils.unpack_tuple(b, args[2])
            total = Lanes(b, ir.Constant(vector(result_kind, WIDTHS[0]), [initial] * WIDTHS[0]))
            start = const_i64(0)
            for width in WIDTHS:
                while total.width > width:
                    total = fold(total, combine)
                pointer = cgutils.alloca_once_value(b, total.value)
                count = b.sdiv(b.sub(n, start), const_i64(width))
                with cgutils.for_range(b, count) as loop:
                    index = b.add(start, b.mul(loop.index, const_i64(width)))
                    value = function(load_lanes(b, x, index, kind, width), *splat_lanes(b, scalar_values, width))
                    b.store(combine(Lanes(b, b.load(pointer)), value).value, pointer)
                start = b.add(start, b.mul(count, const_i64(width)))
                total = Lanes(b, b.load(pointer))
            return total.value

        return (types.float32 if result_kind == F32 else types.int32)(types.int64, types.int64, scalars), codegen

    return kernel


def fold(lanes: Lanes, combine: Callable[[Lanes, Lanes], Lanes]) -> Lanes:
    """Combine the lower half of the lanes with the upper half."""
    b, half = lanes.b, lanes.width // 2
    if half == 1:
        low, high = (b.extract_element(lanes.value, ir.Constant(I32, i)) for i in range(2))
    else:
        undefined = ir.Constant(lanes.value.type, ir.Undefined)
        low, high = (
            b.shuffle_vector(
                lanes.value, undefined, ir.Constant(ir.VectorType(I32, half), list(range(first, first + half)))
            )
            for first in (0, half)
        )
    return combine(Lanes(b, low), Lanes(b, high))
