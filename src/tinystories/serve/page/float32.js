// Numbers in 32 bits, and what e^x is made of. JavaScript computes in 64 bits; Math.fround after every operation gives the
// result that a processor's own 32-bit operation gives, bit for bit.

export const fround = Math.fround;

const ROUNDING = 12582912; // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to an integer, ties to even

export const roundToInteger = (x) => fround(fround(x + ROUNDING) - ROUNDING);

// POWERS[127 + n] is 2^n for n from -127 to 127.
export const POWERS = Float32Array.from({ length: 255 }, (_, i) => 2 ** (i - 127));

const LOG2_E = fround(1.44269504);
const LN2_HIGH = fround(0.693359375);
const LN2_LOW = fround(2.1219444e-4); // ln 2 = LN2_HIGH - LN2_LOW
const C0 = fround(1.98756915e-4);
const C1 = fround(1.3981999507e-3);
const C2 = fround(8.3334519073e-3);
const C3 = fround(4.1665795894e-2);
const C4 = fround(1.6666665459e-1);
const C5 = fround(5.0000001201e-1);

// e^r for small r, by the polynomial of Cephes' expf.
export function polynomial(r) {
  let y = fround(fround(C0 * r) + C1);
  y = fround(fround(y * r) + C2);
  y = fround(fround(y * r) + C3);
  y = fround(fround(y * r) + C4);
  y = fround(fround(y * r) + C5);
  return fround(fround(fround(fround(y * r) * r) + r) + 1);
}

// x = n ln 2 + r with an integer n; ln 2 is subtracted in two parts, so that r keeps its low bits.
export const remainder = (x, n) => fround(fround(x - fround(n * LN2_HIGH)) + fround(n * LN2_LOW));
export const nearestPower = (x) => roundToInteger(fround(x * LOG2_E));
