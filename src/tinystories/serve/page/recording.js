// A page that `tinystories lab --out` has written holds answers about one text, and asks no server.
import { analyze, cutBy, decodeNext, draw } from './sampling.js';

const element = document.getElementById('recording');
export const isRecording = element !== null;
export const recording = isRecording ? unpack(element.textContent) : null; // a promise of what lab/recording.py says
export class NotRecorded extends Error {}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).json();
}

// The recorded answer to a question of the page.
export async function answer(path, body) {
  const data = await recording;
  const recorded = find(data, path, body ?? {});
  if (recorded === undefined) throw new NotRecorded(path);
  return recorded;
}

const same = (a, b) => a.join() === b.join();

function find(data, path, body) {
  const whole = data.paths[''].tokens.ids;
  const isWhole = () => same(body.ids, whole);
  switch (path) {
    case '/lab/api/model': return data.model;
    case '/lab/api/tokens': return body.text === data.text ? data.paths[(body.append ?? []).join()]?.tokens : undefined;
    case '/lab/api/next': return findPath(data, body.ids)?.next;
    case '/lab/api/step': return drawRecorded(data, body);
    case '/lab/api/score': return isWhole() ? data.score : undefined;
    case '/lab/api/heads': return isWhole() ? data.heads : undefined;
    case '/lab/api/lens': return isWhole() ? sliceLens(data.lens, body.start, body.stop) : undefined;
    case '/lab/api/ablate':
      return isWhole() && body.heads.length === 1 ? data.ablations[body.heads[0].join('.')] : undefined;
    case '/lab/api/attention': {
      const text = body.layer === undefined ? data.thumbnails : data.attention[`${body.layer}.${body.head}`];
      return isWhole() ? Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer : undefined;
    }
    default: return undefined;
  }
}

function findPath(data, ids) {
  return Object.values(data.paths).find((path) => same(path.tokens.ids, ids));
}

function drawRecorded(data, { ids, seed, index, ...settings }) {
  const { next } = findPath(data, ids) ?? {};
  const u = data.uniforms[seed - data.seed]?.[index];
  if (!next || u === undefined) return undefined;
  const { logits, seen } = decodeNext(next);
  const step = analyze(logits, settings, seen);
  const { id, below } = draw(step, u);
  const label = next.candidates.find((candidate) => candidate.id === id)?.label ?? `(${id})`;
  return { id, label, u, below, model_prob: step.model[id], final_prob: step.final[id], cut_by: cutBy(step, id) };
}

function sliceLens(lens, start, stop) {
  const cut = (rows) => rows.map((row) => row.slice(start, stop));
  const rows = Object.fromEntries(['top', 'final_probs', 'final_ranks', 'next_ranks', 'kl_bits'].map((name) => [name, cut(lens[name])]));
  return { ...lens, ...rows, positions: lens.positions.slice(start, stop), final_ids: lens.final_ids.slice(start, stop) };
}
