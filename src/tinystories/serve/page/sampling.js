// Sampling as generate/sampling.py defines it, so that a slider moves the bars at once. Probabilities are arrays over all
// ids of the vocabulary.

// The settings in the order in which they are applied.
export const STEPS = ['repetition_penalty', 'temperature', 'top_k', 'top_p', 'min_p'];
const ONE = 2 ** 30; // weights are integers, the largest of them this

export function decodeLogits(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const view = new DataView(bytes.buffer);
  const logits = new Float64Array(bytes.length / 4);
  for (let i = 0; i < logits.length; i++) logits[i] = view.getFloat32(4 * i, true);
  return logits;
}

// The distribution after each step: {model, after: {STEP: ...}, final}. `seen` lists the ids that are penalized.
export function analyze(logits, seen, settings) {
  const { repetition_penalty: penalty, temperature } = settings;
  const penalized = Float64Array.from(logits);
  if (penalty !== 1) for (const id of seen) penalized[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  const best = largest(penalized);
  let weights;
  if (temperature === 0) {
    weights = new Float64Array(logits.length);
    weights[penalized.indexOf(best)] = 1;
  } else {
    weights = penalized.map((logit) => Math.round(ONE * Math.exp((logit - best) / temperature)));
  }
  const after = { repetition_penalty: softmax(penalized), temperature: normalize(weights) };
  const filters = { top_k: keepTopK, top_p: keepTopP, min_p: keepMinP };
  for (const [name, filter] of Object.entries(filters)) {
    if (temperature !== 0) weights = filter(weights, settings[name]);
    after[name] = normalize(weights);
  }
  return { model: softmax(logits), after, final: after.min_p };
}

// The first step after which an id has probability 0; null if it may be drawn.
export function cutBy(step, id) {
  return STEPS.slice(1).find((name) => step.after[name][id] === 0) ?? null;
}

// The id on which u falls, in [0, 1), when the ids lie side by side from 0 to 1; `below` is where it begins.
export function draw(probs, u) {
  const total = sum(probs);
  let below = 0;
  for (let id = 0; id < probs.length; id++) {
    if (probs[id] > 0 && below + probs[id] > u * total) return { id, below };
    below += probs[id];
  }
  const id = probs.indexOf(largest(probs)); // u is close to 1, and rounding left none
  return { id, below: below - probs[id] };
}

export function entropyBits(probs) {
  let bits = 0;
  for (const p of probs) if (p > 0) bits -= p * Math.log2(p);
  return bits;
}

// Tokens that tie with the last one kept are kept too.
function keepTopK(weights, k) {
  if (k <= 0 || k >= weights.length) return weights;
  return keepAtLeast(weights, Float64Array.from(weights).sort().at(-k));
}

function keepTopP(weights, p) {
  if (p >= 1) return weights;
  const sorted = Float64Array.from(weights).sort().reverse();
  const target = p * sum(weights);
  let mass = 0;
  const last = sorted.find((weight) => (mass += weight) >= target);
  return last === undefined ? weights : keepAtLeast(weights, last);
}

function keepMinP(weights, p) {
  return p > 0 ? keepAtLeast(weights, Math.fround(p) * largest(weights)) : weights;
}

const keepAtLeast = (weights, least) => weights.map((weight) => (weight >= least ? weight : 0));
function largest(numbers) {
  let best = -Infinity;
  for (const number of numbers) if (number > best) best = number;
  return best;
}

function sum(numbers) {
  let total = 0;
  for (const number of numbers) total += number;
  return total;
}

function normalize(weights) {
  const total = sum(weights);
  return weights.map((weight) => weight / total);
}

function softmax(logits) {
  const best = largest(logits);
  return normalize(logits.map((logit) => Math.exp(logit - best)));
}
