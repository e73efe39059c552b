// The three inner loops in which nearly all time goes: the product of an int8 matrix and a vector, the scores of attention,
// and its weighted sum. Each exists twice, in JavaScript and in WebAssembly with SIMD; both give the same bits. All arguments
// are numbers: sizes, and byte addresses in one memory that holds the weights, the KV cache and the work buffers.
//
// matmul(w, scales, x, xScale, y, nBlocks, nSteps)
//   y[row] = (sum over columns of w[row, column] * x[column]) * (scales[row] * xScale)
//   Weights are bytes in blocks of 16 rows. In a block, two columns of all 16 rows are next to each other, 32 bytes:
//   row 0 column 0, row 0 column 1, row 1 column 0, ... A step is two such pairs, 64 bytes. x are 16-bit integers whose range
//   was chosen so that no sum overflows 32 bits: sums are exact in any order.
// scores(q, keys, out, n, D)
//   out[s] = q . keys[s] for n keys of D numbers: 8 partial sums over the dimensions, whose halves are added three times.
// mix(weights, values, out, n, D)
//   out[d] = sum over s of weights[s] * values[s, d], one position after the other.
import { fround } from '../../../serve/page/float32.js';

export const BLOCK_ROWS = 16;
const STEP_BYTES = 64;

export function makePlainKernels(buffer) {
  const i8 = new Int8Array(buffer);
  const i16 = new Int16Array(buffer);
  const f32 = new Float32Array(buffer);
  const sums = new Int32Array(BLOCK_ROWS);

  function matmul(w, scales, x, xScale, y, nBlocks, nSteps) {
    for (let block = 0; block < nBlocks; block++) {
      sums.fill(0);
      for (let pair = 0; pair < 2 * nSteps; pair++) {
        const x0 = i16[x / 2 + 2 * pair];
        const x1 = i16[x / 2 + 2 * pair + 1];
        for (let row = 0; row < BLOCK_ROWS; row++, w += 2) sums[row] += Math.imul(i8[w], x0) + Math.imul(i8[w + 1], x1);
      }
      for (let row = 0; row < BLOCK_ROWS; row++, scales += 4, y += 4) {
        f32[y / 4] = fround(sums[row]) * fround(f32[scales / 4] * xScale);
      }
    }
  }

  function scores(q, keys, out, n, D) {
    const partial = new Float32Array(8);
    for (let s = 0; s < n; s++, keys += 4 * D) {
      partial.fill(0);
      let d = 0;
      for (; d + 8 <= D; d += 8) {
        for (let lane = 0; lane < 8; lane++) {
          partial[lane] = fround(partial[lane] + fround(f32[q / 4 + d + lane] * f32[keys / 4 + d + lane]));
        }
      }
      for (let half = 4; half >= 1; half /= 2) {
        for (let lane = 0; lane < half; lane++) partial[lane] = fround(partial[lane] + partial[lane + half]);
      }
      let total = partial[0];
      for (; d < D; d++) total = fround(total + fround(f32[q / 4 + d] * f32[keys / 4 + d]));
      f32[out / 4 + s] = total;
    }
  }

  function mix(weights, values, out, n, D) {
    f32.fill(0, out / 4, out / 4 + D);
    for (let s = 0; s < n; s++, values += 4 * D) {
      const weight = f32[weights / 4 + s];
      for (let d = 0; d < D; d++) f32[out / 4 + d] = fround(f32[out / 4 + d] + fround(weight * f32[values / 4 + d]));
    }
  }

  return { matmul, scores, mix };
}

// The same as WebAssembly, written out as bytes: no compiler is needed, and the whole module is below.
// Reference: https://webassembly.github.io/spec/core/binary/

const I32 = 0x7f;
const F32 = 0x7d;
const V128 = 0x7b;

function unsigned(n) {
  const bytes = [];
  for (; n >= 128; n >>>= 7) bytes.push((n & 127) | 128);
  return [...bytes, n];
}

function signed(n) {
  const bytes = [];
  for (; n < -64 || n > 63; n >>= 7) bytes.push((n & 127) | 128);
  return [...bytes, n & 127];
}

const simd = (code, ...rest) => [0xfd, unsigned(code), ...rest];
const section = (id, ...content) => [id, withLength(content.flat(Infinity))];
const withLength = (bytes) => [unsigned(bytes.length), bytes];
const listOf = (items) => [unsigned(items.length), items];

const get = (local) => [0x20, local];
const set = (local) => [0x21, local];
const constant = (n) => [0x41, signed(n)];
const ADD = 0x6a;
const SHIFT_LEFT = 0x74;
const LESS = 0x48;
const LESS_OR_EQUAL = 0x4c;
const F32_ADD = 0x92;
const F32_MUL = 0x94;
const loadF32 = (offset = 0) => [0x2a, 2, unsigned(offset)];
const storeF32 = [0x38, 2, 0];
const loadVector = (offset = 0) => simd(0, 2, unsigned(offset));
const storeVector = (offset = 0) => simd(11, 2, unsigned(offset));
const load8BytesAs16Bits = (offset) => simd(1, 0, unsigned(offset));
const load32BitsIntoAllLanes = (offset) => simd(9, 0, unsigned(offset));
const ZERO = simd(12, Array(16).fill(0));
const SPLAT_F32 = simd(19);
const lane = (i) => simd(31, i);
const ADD_I32X4 = simd(0xae);
const DOT_I16X8 = simd(0xba); // products of 8 pairs of 16-bit integers, added two by two: 4 sums of 32 bits
const ADD_F32X4 = simd(0xe4);
const MUL_F32X4 = simd(0xe6);
const TO_F32X4 = simd(0xfa);

const increase = (local, amount) => [get(local), constant(amount), ADD, set(local)];
const multiplyBy4 = [constant(2), SHIFT_LEFT];
const whileTrue = (condition, body) => [0x03, 0x40, condition, 0x04, 0x40, body, 0x0c, 1, 0x0b, 0x0b];
const countTo = (i, n, body) => [constant(0), set(i), whileTrue([get(i), get(n), LESS], [body, increase(i, 1)])];

// Locals have numbers: first the parameters, then the others in the order of their types.
function matmulCode() {
  const [w, scales, x, xScale, y, nBlocks, nSteps, block, step, xs, a, b, c, d, xPair] = Array(15).keys();
  const sums = [a, b, c, d]; // of rows 0-3, 4-7, 8-11, 12-15
  const addPair = (pair) => [ // two columns of 16 rows
    get(xs), load32BitsIntoAllLanes(4 * pair), set(xPair),
    sums.map((sum, rows) => [
      get(w), load8BytesAs16Bits(32 * pair + 8 * rows), get(xPair), DOT_I16X8, get(sum), ADD_I32X4, set(sum),
    ]),
  ];
  const scale = (rows, sum) => [
    get(y), get(sum), TO_F32X4, get(scales), loadVector(16 * rows), get(xScale), SPLAT_F32, MUL_F32X4, MUL_F32X4,
    storeVector(16 * rows),
  ];
  const body = countTo(block, nBlocks, [
    sums.map((sum) => [ZERO, set(sum)]),
    get(x), set(xs),
    countTo(step, nSteps, [
      addPair(0), addPair(1),
      increase(w, STEP_BYTES), increase(xs, 8),
    ]),
    sums.map((sum, rows) => scale(rows, sum)),
    increase(scales, 64), increase(y, 64),
  ]);
  return { parameters: [I32, I32, I32, F32, I32, I32, I32], locals: [[3, I32], [5, V128]], body };
}

function scoresCode() {
  const [q, keys, out, n, D, s, d, end, total, low, high] = Array(11).keys();
  const at = (base) => [get(base), get(d), multiplyBy4, ADD]; // the address of number d
  const addProduct = (sum, offset) => [at(q), loadVector(offset), at(keys), loadVector(offset), MUL_F32X4, get(sum), ADD_F32X4, set(sum)];
  const pairOfLanes = (i, j) => [get(low), lane(i), get(low), lane(j), F32_ADD];
  const body = countTo(s, n, [
    ZERO, set(low), ZERO, set(high), constant(0), set(d),
    whileTrue([get(d), constant(8), ADD, get(D), LESS_OR_EQUAL], [addProduct(low, 0), addProduct(high, 16), increase(d, 8)]),
    get(low), get(high), ADD_F32X4, set(low),
    pairOfLanes(0, 2), pairOfLanes(1, 3), F32_ADD, set(total),
    whileTrue([get(d), get(D), LESS], [get(total), at(q), loadF32(), at(keys), loadF32(), F32_MUL, F32_ADD, set(total), increase(d, 1)]),
    get(out), get(total), storeF32,
    increase(out, 4), get(keys), get(D), multiplyBy4, ADD, set(keys),
  ]);
  return { parameters: [I32, I32, I32, I32, I32], locals: [[3, I32], [1, F32], [2, V128]], body };
}

function mixCode() {
  const [weights, values, out, n, D, s, d, row, total, low, high] = Array(11).keys();
  const nextRow = [get(row), get(D), multiplyBy4, ADD, set(row)];
  const weight = [get(weights), get(s), multiplyBy4, ADD, loadF32()];
  const addProduct = (sum, offset) => [get(row), loadVector(offset), weight, SPLAT_F32, MUL_F32X4, get(sum), ADD_F32X4, set(sum)];
  const body = [
    whileTrue([get(d), constant(8), ADD, get(D), LESS_OR_EQUAL], [ // 8 dimensions at a time
      ZERO, set(low), ZERO, set(high), get(values), set(row),
      countTo(s, n, [addProduct(low, 0), addProduct(high, 16), nextRow]),
      get(out), get(low), storeVector(), get(out), get(high), storeVector(16),
      increase(out, 32), increase(values, 32), increase(d, 8),
    ]),
    whileTrue([get(d), get(D), LESS], [
      [0x43, 0, 0, 0, 0], set(total), get(values), set(row), // 0x43: the constant 0 in 32 bits
      countTo(s, n, [get(total), get(row), loadF32(), weight, F32_MUL, F32_ADD, set(total), nextRow]),
      get(out), get(total), storeF32,
      increase(out, 4), increase(values, 4), increase(d, 1),
    ]),
  ];
  return { parameters: [I32, I32, I32, I32, I32], locals: [[3, I32], [1, F32], [2, V128]], body };
}

export function assemble() {
  const functions = { matmul: matmulCode(), scores: scoresCode(), mix: mixCode() };
  const codes = Object.values(functions);
  const name = (text) => listOf([...new TextEncoder().encode(text)]);
  const module = [
    [0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    section(1, listOf(codes.map(({ parameters }) => [0x60, listOf(parameters), 0]))), // types
    section(2, listOf([[name('page'), name('memory'), 2, 0, 0]])), // import: a memory of any size
    section(3, listOf(codes.map((_, i) => i))), // functions, by their types
    section(7, listOf(Object.keys(functions).map((key, i) => [name(key), 0, i]))), // exports
    section(10, listOf(codes.map(({ locals, body }) => withLength([listOf(locals), body, 0x0b].flat(Infinity))))),
  ];
  return Uint8Array.from(module.flat(Infinity));
}

const PAGE_BYTES = 65536; // memory is counted in pages

// Kernels with a memory of this many bytes. Plain ones where the browser has no SIMD, or where `plain` asks for them.
export function makeKernels(nBytes, plain = false) {
  const code = plain ? null : assemble();
  if (code && typeof WebAssembly === 'object' && WebAssembly.validate(code)) {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(nBytes / PAGE_BYTES) });
    const instance = new WebAssembly.Instance(new WebAssembly.Module(code), { page: { memory } });
    return { ...instance.exports, buffer: memory.buffer, kind: 'WebAssembly SIMD' };
  }
  const buffer = new ArrayBuffer(nBytes);
  return { ...makePlainKernels(buffer), buffer, kind: 'plain JavaScript' };
}
