"""What is computed number by number: activation functions, norms, RoPE, conversions; and the sums that norms need."""

from tinystories.engine.cpu.kernels.lanes import Lanes, make_elementwise, make_reduction, select
from tinystories.engine.cpu.kernels.simd import I8, I16

ROUNDING = 12582912.0  # 1.5 * 2^23: adding it to |x| < 2^22 rounds x to an integer, ties to even, in the low bits
MAX_FINITE_BITS = 0x7F7FFFFF  # bits of the largest finite fp32 number


def exp(x: Lanes) -> Lanes:
    """Return e^x with a relative error below 2e-7; x is clamped to [-87.3, 88], NaN stays NaN.

    The polynomial of Cephes' expf.
    """
    x = select(x > 88.0, 88.0, x)
    x = select(x < -87.3, -87.3, x)
    # e^x = 2^n e^r with n = round(x / ln 2). ln 2 is subtracted in two parts, so that r keeps its low bits.
    shifted = x * 1.44269504 + ROUNDING
    n = shifted - ROUNDING
    r = x - n * 0.693359375 + n * 2.12194440e-4
    y = Lanes(x.b, x.constant(1.9875691500e-4))
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + coefficient
    y = y * r * r + r + 1.0
    # The bits of 2^n: a biased exponent and an empty mantissa. The low bits of `shifted` are n.
    return y * ((shifted.bits() << 23) + (127 << 23)).as_float()


def gelu_tanh(x: Lanes) -> Lanes:
    """Tanh approximation of GELU (Hendrycks and Gimpel 2016), as in GPT-2.

    x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    return x / (exp(x * (x * x * -0.0713548163 + -1.5957691216)) + 1.0)


def gelu_erf(x: Lanes) -> Lanes:
    """Exact GELU, x (1 + erf(x / sqrt(2))) / 2, with an error below 1e-7 |x|.

    Abramowitz and Stegun, formula 7.1.26.
    """
    magnitude = (x.bits() & 0x7FFFFFFF).as_float()
    denominator = magnitude * 0.23164189 + 1.0
    t = Lanes(x.b, x.constant(1.0)) / denominator
    y = Lanes(x.b, x.constant(1.061405429))
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = y * t + coefficient
    tail = y * t * 0.5 * exp(x * x * -0.5)
    return x * select(x > 0.0, -tail + 1.0, tail)


def round_to_int(x: Lanes, inverse_scale: Lanes) -> Lanes:
    """Return x * inverse_scale rounded to an integer, ties to even, in the low 22 bits of the result."""
    return (x * inverse_scale + ROUNDING).bits()


def ordered_bits(x: Lanes) -> Lanes:
    """Return integers that compare as the fp32 numbers do; the function is its own inverse on bits."""
    bits = x.bits()
    return bits ^ (bits.sign_mask() & 0x7FFFFFFF)


def to_f16(x: Lanes) -> Lanes:
    """Return the bits of the nearest fp16 numbers, ties to even; what is too large becomes infinite."""
    bits = x.bits()
    magnitude = bits & 0x7FFFFFFF
    # Rebias the exponent by 15 - 127 and round the 13 bits that are lost; a carry into the exponent is right.
    normal = (magnitude + ((magnitude >> 13) & 1) + (0xFFF - (112 << 23))) >> 13
    # Below 2^-14: an addition aligns the mantissa to multiples of 2^-24, and rounds it.
    subnormal = (magnitude.as_float() + 0.5).bits() - (126 << 23)
    special = select(magnitude > 0x7F800000, Lanes(x.b, magnitude.constant(0x7E00)), 0x7C00)  # NaN, infinity
    result = select(magnitude < 113 << 23, subnormal, normal)
    result = select(magnitude > (143 << 23) - 1, special, result)
    return (result | ((bits >> 16) & 0x8000)).truncate(I16)


def from_f16(bits: Lanes) -> Lanes:
    """Return the fp32 values of fp16 numbers, given as 16-bit integers."""
    wide = bits.widen_unsigned()
    magnitude = (wide & 0x7FFF) << 13
    finite = magnitude.as_float() * 2.0**112  # 127 - 15: the exponents' biases; exact, also for subnormal numbers
    special = (magnitude | 0x7F800000).as_float()  # infinity and NaN
    result = select(magnitude > 0x0F7FFFFF, special, finite)
    return (result.bits() | ((wide & 0x8000) << 16)).as_float()


def add(a: Lanes, b: Lanes) -> Lanes:
    return a + b


def square_of_difference(x: Lanes, mean: Lanes) -> Lanes:
    return (x - mean) * (x - mean)


sum_f32 = make_reduction(lambda x: x, add, 0.0)
sum_squares = make_reduction(square_of_difference, add, 0.0)  # of the differences from a number
sum_i8 = make_reduction(lambda x: x.widen(), add, 0, I8)
# The bits of the largest magnitude: infinities and NaN are above `MAX_FINITE_BITS`. As integers, since the maximum of
# floats depends on their order if there is a NaN.
max_magnitude_bits = make_reduction(lambda x: x.bits() & 0x7FFFFFFF, lambda a, b: select(a > b, a, b), 0)
max_ordered_bits = make_reduction(ordered_bits, lambda a, b: select(a > b, a, b), -(2**31))

# Functions of (outputs, inputs, n, scalars); see `make_elementwise`.
copy_f32 = make_elementwise(lambda x: x)
add_f32 = make_elementwise(add)
divide_f32 = make_elementwise(lambda x, divisor: x / divisor)
quantize_i16 = make_elementwise(lambda x, inverse_scale: round_to_int(x, inverse_scale).truncate(I16))
quantize_i8 = make_elementwise(lambda x, inverse_scale: round_to_int(x, inverse_scale).truncate(I8))
scale_by_weight = make_elementwise(lambda x, weight, scale: x * scale * weight)
scale_and_shift = make_elementwise(lambda x, weight, bias, mean, scale: (x - mean) * scale * weight + bias)
rotate_pairs = make_elementwise(lambda x, y, cos, sin: (x * cos - y * sin, y * cos + x * sin))
multiply_by_silu = make_elementwise(lambda x, gate: x * (gate / (exp(-gate) + 1.0)))
apply_gelu_tanh = make_elementwise(gelu_tanh)
apply_gelu_erf = make_elementwise(gelu_erf)
apply_relu = make_elementwise(lambda x: select(x < 0.0, 0.0, x))
