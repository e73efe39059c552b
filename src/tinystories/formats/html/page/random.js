// The random numbers of a story: those of NumPy's default_rng([seed, story]).random(dtype=float32), so that a seed tells the
// story that it tells on the command line. NumPy spreads a seed by SeedSequence (after Melissa O'Neill's seed_seq_fe) and
// draws by PCG64 (O'Neill 2014, XSL-RR); both are integer arithmetic, of 32 and of 128 bits.

const POOL_SIZE = 4;

// A non-negative integer as words of 32 bits, the lowest first.
function toWords(integer) {
  const words = [];
  for (let rest = BigInt(integer); rest > 0n; rest >>= 32n) words.push(Number(rest & 0xffffffffn));
  return words.length ? words : [0];
}

// A hash of words whose constant changes with each use.
function makeHash(constant, multiplier) {
  return (value) => {
    value ^= constant;
    constant = Math.imul(constant, multiplier);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
}

function mixWords(x, y) {
  const result = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) | 0;
  return result ^ (result >>> 16);
}

// NumPy's SeedSequence(integers).generate_state(nWords), as 32-bit words.
export function generateState(integers, nWords) {
  const entropy = integers.flatMap(toWords);
  const hash = makeHash(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: POOL_SIZE }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < POOL_SIZE; from++) {
    for (let to = 0; to < POOL_SIZE; to++) if (from !== to) pool[to] = mixWords(pool[to], hash(pool[from]));
  }
  for (const word of entropy.slice(POOL_SIZE)) {
    for (let to = 0; to < POOL_SIZE; to++) pool[to] = mixWords(pool[to], hash(word));
  }
  const outputHash = makeHash(0x8b51f9dd, 0x58f38ded);
  return Array.from({ length: nWords }, (_, i) => outputHash(pool[i % POOL_SIZE]) >>> 0);
}

const MULTIPLIER = (2549297995355413924n << 64n) + 4865540595714422341n;
const to64 = (n) => BigInt.asUintN(64, n);
const to128 = (n) => BigInt.asUintN(128, n);

// The numbers of story number `story` of a seed: each call of next() returns one in [0, 1), a multiple of 2^-24.
export class UniformStream {
  constructor(seed, story = 0) {
    const words = generateState([seed, story], 8).map(BigInt);
    const [stateHigh, stateLow, streamHigh, streamLow] = [0, 2, 4, 6].map((i) => (words[i + 1] << 32n) | words[i]);
    this.increment = to128((((streamHigh << 64n) | streamLow) << 1n) | 1n);
    this.state = 0n;
    this.advance();
    this.state = to128(this.state + ((stateHigh << 64n) | stateLow));
    this.advance();
    this.waiting = null; // a draw of 64 bits gives two numbers, from the low half and from the high one
  }

  advance() {
    this.state = to128(this.state * MULTIPLIER + this.increment);
  }

  next() {
    let word = this.waiting;
    if (word === null) {
      this.advance();
      const folded = to64((this.state >> 64n) ^ this.state);
      const rotation = this.state >> 122n;
      const drawn = to64((folded >> rotation) | (folded << ((64n - rotation) & 63n)));
      word = Number(drawn & 0xffffffffn);
      this.waiting = Number(drawn >> 32n);
    } else {
      this.waiting = null;
    }
    return (word >>> 8) / 2 ** 24;
  }
}
