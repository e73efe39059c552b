// A story, token by token; and what could come next. Both on top of one engine, whose KV cache they share.
import { Engine } from './engine.js';
import { Detokenizer, Tokenizer } from './tokenizer.js';
import { UniformStream } from './random.js';
import { SeenIds } from './seen.js';
import { analyze, cutBy, draw as drawFrom, entropyBits, sampleToken } from '../../../serve/page/sampling.js';

const NOT_FINITE = 'the numbers of this model are damaged';

// One bit for each id, as base64.
function decodeBits(base64) {
  const bytes = atob(base64);
  return (id) => ((bytes.charCodeAt(id >> 3) >> (id & 7)) & 1) === 1;
}

export class Storyteller {
  constructor(header, options) {
    this.header = header;
    this.engine = new Engine(header, options);
    this.tokenizer = new Tokenizer(header.tokenizer);
    this.isName = decodeBits(header.name_ids);
    this.cached = []; // ids in the KV cache
  }

  // Logits after a context of at most n_ctx ids. What the cache already holds of its beginning is not computed again.
  readContext(ids) {
    let n = 0;
    while (n < ids.length - 1 && n < this.cached.length && this.cached[n] === ids[n]) n += 1;
    this.engine.nRead = n;
    this.cached.length = n;
    let logits = null;
    for (; n < ids.length; n++) {
      logits = this.engine.readToken(ids[n], n === ids.length - 1);
      this.cached.push(ids[n]);
    }
    return logits;
  }

  // A text longer than the context is cut to its newest half.
  fit(context) {
    const { n_ctx } = this.header.config;
    return context.length > n_ctx ? context.slice(-Math.max(1, Math.floor(n_ctx / 2))) : context;
  }

  startSeen(settings, ids) {
    const isSpared = settings.penalize_names ? () => false : this.isName;
    const seen = new SeenIds(this.header.config.vocab_size, settings.repetition_window, isSpared);
    for (const id of ids) if (id !== this.tokenizer.endId) seen.add(id);
    return seen;
  }

  // Yields {id, text} for each token of a story, and at last {reason, text}: "end" or "length". The text continues the prompt.
  *tell({ prompt, seed, settings, maxTokens, story = 0 }) {
    let context = [this.tokenizer.endId, ...this.tokenizer.encode(prompt)];
    const uniforms = new UniformStream(seed, story);
    const detokenizer = new Detokenizer(this.tokenizer);
    const seen = this.startSeen(settings, context);
    for (let n = 1; ; n++) {
      context = this.fit(context);
      const id = sampleToken(this.readContext(context), settings, uniforms.next(), seen.flags);
      if (id < 0) throw new Error(NOT_FINITE);
      const isEnd = this.tokenizer.isStop(id);
      if (!isEnd) {
        context.push(id);
        seen.add(id);
      }
      yield { id, text: isEnd ? '' : detokenizer.add(id) };
      if (isEnd || n === maxTokens) return yield { reason: isEnd ? 'end' : 'length', text: detokenizer.finish() };
    }
  }

  // What could come after a text and some more ids: the likeliest tokens and END, with their probabilities before and after
  // the settings, and the first setting that cuts each off. `draw` ({seed, index}) also draws one.
  whatNext({ text, appended = [], settings, top = 12, draw = null }) {
    const ids = [this.tokenizer.endId, ...this.tokenizer.encode(text), ...appended];
    const logits = this.readContext(this.fit(ids));
    const seen = this.startSeen(settings, ids);
    const step = analyze(logits, settings, seen.flags);
    if (!step) throw new Error(NOT_FINITE);
    const { model, final } = step;
    const likeliest = Array.from(model.keys()).sort((a, b) => model[b] - model[a] || a - b).slice(0, top);
    const candidate = (id) => ({
      id,
      label: this.tokenizer.label(id),
      modelProb: model[id],
      finalProb: final[id],
      cutBy: cutBy(step, id),
    });
    const result = {
      candidates: [...new Set([...likeliest, this.tokenizer.endId])].map(candidate),
      nKept: final.reduce((n, p) => n + (p > 0), 0),
      entropy: entropyBits(model),
      tail: this.decode(appended),
    };
    if (draw) {
      const uniforms = new UniformStream(draw.seed);
      for (let i = 0; i < draw.index; i++) uniforms.next();
      const u = uniforms.next();
      const { id, below } = drawFrom(step, u);
      result.drawn = { ...candidate(id), u, below };
    }
    return result;
  }

  decode(ids) {
    const detokenizer = new Detokenizer(this.tokenizer);
    return ids.map((id) => detokenizer.add(id)).join('') + detokenizer.finish();
  }
}
