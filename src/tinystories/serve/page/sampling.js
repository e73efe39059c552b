// The next token, as generate/sampling.py defines it: from logits (V) to one id. Repetition penalty, temperature, top-k,
// top-p and min-p, in this order. Weights are integers, 2^30 for the likeliest token: their sums are exact, so that the
// same logits and the same random number give the same id everywhere.
import { POWERS, fround, nearestPower, polynomial, remainder } from './float32.js';

const MIN_TEMPERATURE = 1e-30; // others would overflow, and sample the same tokens
const MAX_TEMPERATURE = 1e30;
export const NO_WEIGHT = fround(-22); // 2^30 e^-22 is rounded to 0

// Half an integer is rounded to the even one.
export function roundHalfToEven(y) {
  const below = Math.floor(y);
  const rest = y - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 ? below + 1 : below;
}

// 2^30 e^x for NO_WEIGHT <= x <= 0, rounded to an integer.
export function weightOf(x) {
  const n = nearestPower(x);
  return roundHalfToEven(fround(polynomial(remainder(x, n)) * POWERS[127 + 30 + n]));
}

// Logits after the repetition penalty (CTRL, arXiv 1909.05858), a new array. `seen`: a byte for each id.
export function penalize(logits, penalty, seen) {
  const z = Float32Array.from(logits);
  const divisor = fround(penalty);
  if (divisor === 1) return z;
  for (let id = 0; id < z.length; id++) if (seen[id]) z[id] = z[id] > 0 ? z[id] / divisor : z[id] * divisor;
  return z;
}

// The lowest id of the largest logit; -1 if that is not finite, or any logit is NaN.
export function argmax(z) {
  let best = 0;
  for (let id = 0; id < z.length; id++) {
    if (Number.isNaN(z[id])) return -1;
    if (z[id] > z[best]) best = id;
  }
  return Number.isFinite(z[best]) ? best : -1;
}

// Weights (V) of logits at a temperature; at temperature 0 only the best id has one. `best`: from argmax, not -1. Where a
// logit is less than e^lowest times as likely as the best one, the weight is 0.
export function computeWeights(z, temperature, best, lowest = NO_WEIGHT) {
  const weights = new Float64Array(z.length);
  if (temperature === 0) {
    weights[best] = 1;
    return weights;
  }
  const divisor = fround(Math.min(Math.max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE));
  for (let id = 0; id < z.length; id++) {
    const x = fround(fround(z[id] - z[best]) / divisor);
    if (x >= lowest) weights[id] = weightOf(x);
  }
  return weights;
}

function total(weights) {
  let sumOfAll = 0;
  for (const weight of weights) sumOfAll += weight;
  return sumOfAll;
}

function keepAtLeast(weights, threshold) {
  for (let id = 0; id < weights.length; id++) if (weights[id] < threshold) weights[id] = 0;
}

const positiveDescending = (weights) => weights.filter((weight) => weight > 0).sort().reverse();

// Each filter sets weights to 0, in place. Tokens that tie with the last one kept are kept too.
export const FILTERS = {
  top_k(weights, k) {
    const descending = k > 0 && k < weights.length ? positiveDescending(weights) : [];
    if (k < descending.length) keepAtLeast(weights, descending[k - 1]);
  },
  top_p(weights, p) {
    if (p >= 1) return;
    const goal = p * total(weights);
    let reached = 0;
    for (const weight of positiveDescending(weights)) {
      reached += weight;
      if (reached >= goal) return keepAtLeast(weights, weight);
    }
  },
  min_p(weights, p) {
    if (p <= 0) return;
    let largest = 0;
    for (const weight of weights) if (weight > largest) largest = weight;
    keepAtLeast(weights, fround(fround(p) * largest));
  },
};

// Inverts the cumulative distribution at u in [0, 1).
function invert(weights, u) {
  const goal = u * total(weights);
  let reached = 0;
  for (let id = 0; id < weights.length; id++) {
    reached += weights[id];
    if (weights[id] > 0 && reached > goal) return id;
  }
  return argmax(Float32Array.from(weights));
}

// The next id; -1 if the logits are not finite.
export function sampleToken(logits, settings, u, seen) {
  const z = penalize(logits, settings.repetition_penalty, seen);
  const best = argmax(z);
  if (best < 0 || settings.temperature === 0) return best;
  // Weights below min-p times the largest will be cut, so they need not be computed; with top-p they count before.
  const lowest = settings.top_p < 1 ? NO_WEIGHT : Math.max(NO_WEIGHT, Math.log(settings.min_p) * 1.001 - 1e-6);
  const weights = computeWeights(z, settings.temperature, best, lowest);
  for (const [name, filter] of Object.entries(FILTERS)) filter(weights, settings[name]);
  return invert(weights, u);
}

// How the next token is chosen, for people: probabilities (V) by the model, after each step, and at the end, with the
// weights (V) of the end. null if the logits are not finite. `seen`: a byte for each id.
export function analyze(logits, settings, seen) {
  const z = penalize(logits, settings.repetition_penalty, seen);
  const best = argmax(z);
  if (best < 0) return null;
  const weights = computeWeights(z, settings.temperature, best);
  const after = { repetition_penalty: softmax(z), temperature: normalize(weights) };
  for (const [name, filter] of Object.entries(FILTERS)) {
    filter(weights, settings[name]);
    after[name] = normalize(weights);
  }
  return { model: softmax(logits), after, final: after.min_p, weights };
}

// The first step after which an id has probability 0; null if it may be drawn.
export function cutBy(step, id) {
  return Object.keys(step.after).slice(1).find((name) => step.after[name][id] === 0) ?? null;
}

// The id that u in [0, 1) samples. The ids lie side by side from 0 to 1, and u falls on one: `below` is where it begins.
export function draw({ weights }, u) {
  const id = invert(weights, u);
  return { id, below: total(weights.subarray(0, id)) / total(weights) };
}

export function entropyBits(probs) {
  let bits = 0;
  for (const p of probs) if (p > 0) bits -= p * Math.log2(p);
  return bits;
}

// What /lab/api/next sends for all ids: {logits, seen}, as `analyze` takes them.
export function decodeNext({ logits: text, seen: ids }) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const logits = Float32Array.from({ length: bytes.length / 4 }, (_, id) => view.getFloat32(4 * id, true));
  const seen = new Uint8Array(logits.length);
  for (const id of ids) seen[id] = 1;
  return { logits, seen };
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  return normalize(Float64Array.from(logits, (z) => Math.exp(z - largest)));
}

function normalize(weights) {
  const sumOfAll = total(weights);
  return weights.map((weight) => weight / sumOfAll);
}
