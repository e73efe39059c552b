// Functions of numbers in 32 bits, as the CPU engine defines them bit for bit, and sums.
import { POWERS, fround, nearestPower, polynomial, remainder } from '../../../serve/page/float32.js';

const LARGEST = fround(88);
const SMALLEST = fround(-87.3);

// e^x with x clamped to [-87.3, 88]: 2^n e^r.
export function exp(x) {
  if (x > LARGEST) x = LARGEST;
  if (x < SMALLEST) x = SMALLEST;
  const n = nearestPower(x);
  return fround(polynomial(remainder(x, n)) * POWERS[127 + n]);
}

const bits = new Int32Array(1);
const number = new Float32Array(bits.buffer);

// The nearest number of 16 bits (fp16), ties to even, as keys and values are kept.
export function roundToHalf(x) {
  const magnitude = Math.abs(x);
  if (magnitude === 0) return x; // also -0
  if (magnitude >= 65520) return x < 0 ? -Infinity : Infinity;
  if (magnitude < 2 ** -14) {
    // Multiples of 2^-24. Adding 0.5 aligns the number to them, and rounds it.
    const rounded = fround(fround(magnitude + 0.5) - 0.5);
    return x < 0 ? -rounded : rounded;
  }
  if (!(magnitude < Infinity)) return x; // NaN
  number[0] = x;
  bits[0] = (bits[0] + 0xfff + ((bits[0] >> 13) & 1)) & ~0x1fff; // 13 bits fewer; a carry into the exponent is right
  return number[0];
}

// The order of a sum decides its last bits. It is: 16 partial sums, whose halves are added until 4 are left; 4 numbers at
// a time of what remains; halves again; then one by one. f(x) is added: x itself, or its squared distance from the mean.
const partial = new Float32Array(16);

function foldHalves(width) {
  for (let i = 0; i < width / 2; i++) partial[i] = fround(partial[i] + partial[i + width / 2]);
}

export function sum(x, n) {
  partial.fill(0);
  let i = 0;
  for (; i + 16 <= n; i += 16) for (let lane = 0; lane < 16; lane++) partial[lane] = fround(partial[lane] + x[i + lane]);
  foldHalves(16);
  foldHalves(8);
  for (; i + 4 <= n; i += 4) for (let lane = 0; lane < 4; lane++) partial[lane] = fround(partial[lane] + x[i + lane]);
  foldHalves(4);
  foldHalves(2);
  let total = partial[0];
  for (; i < n; i++) total = fround(total + x[i]);
  return total;
}

export function sumOfSquares(x, n, mean) {
  partial.fill(0);
  let i = 0;
  for (; i + 16 <= n; i += 16) {
    for (let lane = 0; lane < 16; lane++) {
      const difference = fround(x[i + lane] - mean);
      partial[lane] = fround(partial[lane] + fround(difference * difference));
    }
  }
  foldHalves(16);
  foldHalves(8);
  for (; i + 4 <= n; i += 4) {
    for (let lane = 0; lane < 4; lane++) {
      const difference = fround(x[i + lane] - mean);
      partial[lane] = fround(partial[lane] + fround(difference * difference));
    }
  }
  foldHalves(4);
  foldHalves(2);
  let total = partial[0];
  for (; i < n; i++) {
    const difference = fround(x[i] - mean);
    total = fround(total + fround(difference * difference));
  }
  return total;
}

// The activation functions of the MLP.
export const silu = (gate) => fround(gate / fround(exp(-gate) + 1));
export const relu = (x) => (x < 0 ? 0 : x);

const GELU_CUBIC = fround(-0.0713548163);
const GELU_LINEAR = fround(-1.5957691216);

// x (1 + tanh(u)) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), Hendrycks and Gimpel 2016.
export function geluTanh(x) {
  const exponent = fround(x * fround(fround(fround(x * x) * GELU_CUBIC) + GELU_LINEAR));
  return fround(x / fround(exp(exponent) + 1));
}

const ERF_T = fround(0.23164189);
const ERF = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592].map(fround);

// x (1 + erf(x / sqrt 2)) / 2, by formula 7.1.26 of Abramowitz and Stegun.
export function geluErf(x) {
  const t = fround(1 / fround(fround(Math.abs(x) * ERF_T) + 1));
  let y = ERF[0];
  for (let i = 1; i < ERF.length; i++) y = fround(fround(y * t) + ERF[i]);
  const tail = fround(fround(fround(y * t) * 0.5) * exp(fround(fround(x * x) * -0.5)));
  return fround(x * (x > 0 ? fround(1 - tail) : tail));
}
