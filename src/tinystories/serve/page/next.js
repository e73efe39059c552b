// Next word: what could come next? Bars before and after each sampling setting, a draw, and the paths that were followed.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { drawBars, drawTree } from './drawing.js';
import { Endings } from './endings.js';
import { Tools } from './figures.js';
import { pythonEndings, pythonLoad, pythonNext, pythonTrace, pythonTree } from './python.js';
import { analyze, cutBy, decodeNext, entropyBits } from './sampling.js';
import { LAB as T } from './texts.js';
import { KNOBS, percent } from './shared.js';
import { layOut, remember, Tree } from './tree.js';
import { html, moveInGroup, useEffect, useMemo, useRef, useState, WRITING } from './ui.js';

const N_BARS = 12;
const N_LABELS = 40; // tokens whose labels the server sends
const MIN_SEGMENT = 0.01; // smaller ones are not drawn on the line from 0 to 1
const MAX_QUEUED = 8; // keys

export const readAppended = (state) => (state?.a ?? '').split(',').filter((id) => /^\d{1,7}$/.test(id)).map(Number);

export function NextPane({ tokens, state, go, model, fail, attempt, latest, tree, isFresh }) {
  const [drawn, setDrawn] = useState(null);
  const [spoken, setSpoken] = useState('');
  const current = useRef(null); // what key handlers see
  const isDrawing = useRef(false);
  const queue = useRef({ actions: [], place: '' }); // keys that wait for the bars of their place
  const nDraws = useRef(new Map()); // at each place: the first draw there is that of the seed, others are of seeds after it
  const N = T.next;

  function valueOf({ name, key, min, max }) {
    const value = Number(state[key]);
    return state[key] !== undefined && state[key] !== '' && Number.isFinite(value) ? Math.min(max, Math.max(min, value)) : model.sampling[name];
  }
  const sampling = Object.fromEntries(KNOBS.map((knob) => [knob.name, valueOf(knob)]));
  const seed = /^\d{1,15}$/.test(state.seed ?? '') ? Number(state.seed) : 1;
  const answer = useAnswer(ask, '/lab/api/next', { ids: tokens.ids, top: N_LABELS, logits: true, attempt }, fail);
  const isCurrent = answer && answer.body.ids.join() === tokens.ids.join();
  const next = useMemo(() => answer && decodeNext(answer.data), [answer]);
  const step = useMemo(() => answer && analyze(next.logits, sampling, next.seen), [answer, ...Object.values(sampling)]);
  const entropy = useMemo(() => step && entropyBits(step.model), [answer]);
  const labels = new Map(answer?.data.candidates.map(({ id, label }) => [id, label]));
  const candidates = step ? describe(answer.data, step) : [];
  const rest = step && describeRest(candidates, N.others);
  const longest = Math.max(0.01, ...[...candidates, rest].filter(Boolean).flatMap(({ model, final }) => [model, final]));
  const nKept = step ? step.final.filter((p) => p > 0).length : 0;
  const appended = readAppended(state);
  const chosen = tokens.pieces.slice(tokens.pieces.length - appended.length).map(({ id, label }) => ({ id, label }));
  useMemo(() => isFresh && remember(tree.current, state.t, chosen), [tokens, isFresh]);

  // Whether the tokens are those of the newest state; until then, the bars are of the past.
  const isSettled = () => isFresh && latest.current.t === state.t && readAppended(latest.current).join() === appended.join();
  const placeNow = () => JSON.stringify([latest.current.t, latest.current.a ?? '']);

  // Do something with the bars ('draw', 'rewind', or the number of one): at once, or when those of the newest text are
  // there. What waits is forgotten if the text is changed by other means.
  function act(action) {
    forgetOtherPlace();
    if (queue.current.actions.length < MAX_QUEUED) queue.current.actions.push(action);
    workOff();
  }

  function forgetOtherPlace() {
    if (queue.current.place !== placeNow()) Object.assign(queue.current, { actions: [], place: placeNow() });
  }

  function workOff() {
    forgetOtherPlace();
    const now = current.current;
    if (!queue.current.actions.length || isDrawing.current || !now.isCurrent || !now.isSettled()) return;
    const action = queue.current.actions.shift();
    if (action === 'draw') now.draw();
    else if (action === 'rewind') now.rewind();
    else if (now.candidates[action - 1]) now.choose(now.candidates[action - 1]);
  }

  // Take back a key that waits, or the last token.
  function takeBack() {
    forgetOtherPlace();
    const { actions } = queue.current;
    if (actions.length && actions.at(-1) !== 'rewind') actions.pop();
    else if (!actions.length && !isDrawing.current && readAppended(latest.current).length) rewind();
    else act('rewind');
  }

  function goOn(changes) {
    go(changes);
    queue.current.place = placeNow();
  }

  function choose({ id, label, model: p }) {
    if (!isSettled()) return false;
    remember(tree.current, state.t, [...chosen, { id, label, p }]);
    setSpoken(label);
    setDrawn(null);
    goOn({ a: [...appended, id].join(','), c: '' });
    return true;
  }

  async function draw() {
    isDrawing.current = true;
    const { ids, sampling, nAppended, step, labels } = current.current;
    try {
      const place = ids.join();
      const n = nDraws.current.get(place) ?? 0;
      const result = await ask('/lab/api/step', { ids, ...sampling, seed: seed + n, index: nAppended });
      nDraws.current.set(place, n + 1);
      if (current.current.ids.join() !== place) return; // the text was changed meanwhile
      const isChosen = current.current.choose({ id: result.id, label: result.label, model: result.model_prob });
      if (isChosen) setDrawn({ ...result, segments: cutLine(step.final, labels, result) });
      fail(null);
    } catch (error) {
      queue.current.actions = [];
      fail(error);
    } finally {
      isDrawing.current = false;
      workOff();
    }
  }

  function rewind() {
    const before = readAppended(latest.current);
    setDrawn(null);
    if (before.length) {
      goOn({ a: before.slice(0, -1).join(','), c: '' });
    } else if (tokens.pieces.length > 1) {
      goOn({ t: tokens.text.slice(0, tokens.pieces.at(-1).start), a: '', c: '' });
    }
  }

  current.current = { isCurrent, candidates, sampling, step, labels, ids: tokens.ids, nAppended: appended.length, isSettled, act, takeBack, choose, draw, rewind };
  useEffect(workOff);
  useEffect(() => {
    const onKey = (event) => {
      if (event.target.matches(WRITING) || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
      const isDraw = event.key === ' ' && !event.target.matches('button, a, summary');
      const isRewind = event.key.toLowerCase() === 'r';
      if (!isDraw && !isRewind && !/^[1-9]$/.test(event.key)) return;
      event.preventDefault();
      if (event.repeat && queue.current.actions.length) return; // a key that is held down does not outrun the bars
      if (isRewind) current.current.takeBack();
      else current.current.act(isDraw ? 'draw' : event.key);
    };
    addEventListener('keydown', onKey);
    return () => {
      queue.current.actions = [];
      removeEventListener('keydown', onKey);
    };
  }, []);

  const bars = [...candidates, rest].filter(Boolean);
  const trace = () => pythonTrace(model, tokens, appended);
  const title = () => N.figure(tokens.text.slice(-60));
  const isPlain = !appended.length && !tokens.n_dropped;
  return html`<section class="pane" aria-label=${N.name}>
    <h2>${N.question}</h2><p>${N.explanation}</p>
    <p class="card tail"><span class="soft">… </span>${tokens.text.slice(-160)}<b> ▁</b></p>
    <div class="split">
      <div class="card"><div class="bars" role="group" aria-label=${N.bars} data-text=${isCurrent && isFresh ? tokens.text : ''} aria-busy=${!(isCurrent && isFresh)} onKeyDown=${moveInGroup}>${candidates.map(
        (c, i) => html`<button type="button" class=${c.cut ? 'bar cut' : 'bar'} data-item tabindex=${i ? -1 : 0} data-id=${c.id}
            aria-label=${`${c.label}: ${N.model} ${percent(c.model)}, ${c.cut ? N.cutBy(c.cut) : `${N.final} ${percent(c.final)}`}`}
            onClick=${() => isCurrent && choose(c)}>
          <kbd>${i < 9 ? i + 1 : ''}</kbd><span class="label">${c.label}</span><${Track} model=${c.model / longest} final=${c.final / longest} />
          <span class="number">${percent(c.model)} → ${c.cut ? N.cutBy(c.cut) : percent(c.final)}</span></button>`,
      )}${rest && html`<div class="bar"><kbd></kbd><span class="label soft">${rest.label}</span><${Track} model=${rest.model / longest} final=${rest.final / longest} />
        <span class="number">${percent(rest.model)} → ${percent(rest.final)}</span></div>`}</div>
        <p class="soft">${N.legend}</p>
        ${step && html`<${Tools} name="next-word" isReady=${isCurrent} svg=${() => drawBars(bars.map((bar) => ({ ...bar, cut: bar.cut && N.cutBy(bar.cut) })), title(), N.figureLegend)}
          data=${() => ({ text: tokens.text, ids: tokens.ids, settings: sampling, n_kept: nKept, entropy_bits: entropy, candidates: bars })}
          rows=${() => [['id', 'token', 'model', 'final', 'cut_by'], ...bars.map((bar) => [bar.id, bar.label, bar.model, bar.final, bar.cut])]}
          python=${() => pythonNext(trace(), sampling, N_BARS)} />`}</div>
      <aside class="card knobs">${KNOBS.map((knob) => html`<div class="knob"><label for=${knob.key}>${N.knobs[knob.name]}</label>
          <output for=${knob.key}>${N.show(knob.name, valueOf(knob))}</output>
          <input id=${knob.key} type="range" min=${knob.min} max=${knob.max} step=${knob.step} value=${valueOf(knob)}
            onInput=${(event) => go({ [knob.key]: event.target.value }, { replace: true })} /></div>`)}
        ${step && html`<p class="soft">${N.kept(nKept, model.vocab_size, entropy)}</p>`}
        <div class="row"><button type="button" class="primary" onClick=${() => act('draw')}>${N.draw}</button>
          <button type="button" onClick=${takeBack}>${N.rewind}</button></div>
      </aside>
    </div>
    ${drawn && html`<div class="card"><p>${N.drawn(drawn)}</p><${Line} drawn=${drawn} /></div>`}
    ${tree.current.root.children.length > 0 && tree.current.text === state.t && html`<div class="card"><h3>${N.tree}</h3><p class="soft">${N.treeHint}</p>
      <${Tree} tree=${tree.current} current=${appended} label=${N.tree} onGo=${(ids) => go({ a: ids.join(','), c: '' })} />
      <${TreeTools} tree=${tree.current} current=${appended} start=${isFresh ? tokens.ids.slice(0, tokens.ids.length - appended.length) : []} model=${model} /></div>`}
    <${Endings} prompt=${isPlain ? tokens.text : tokens.ids} isFresh=${isFresh} sampling=${sampling} seed=${seed} fail=${fail}
      isPlain=${isPlain && seed === 1 && Object.entries(sampling).every(([name, value]) => value === model.sampling[name])}
      python=${(options) => pythonEndings(pythonLoad(model), tokens.text, options)} />
    <div class="sr-only" aria-live="polite">${spoken}</div>
  </section>`;
}

// The likeliest tokens by the model, and END: {id, label, model, final, cut}.
function describe({ candidates, end_id }, step) {
  return candidates
    .filter(({ id }, i) => i < N_BARS || id === end_id)
    .map(({ id, label }) => ({ id, label, model: step.model[id], final: step.final[id], cut: cutBy(step, id) }));
}

function describeRest(candidates, label) {
  const missing = (name) => Math.max(0, 1 - candidates.reduce((sum, candidate) => sum + candidate[name], 0));
  return { id: null, label, model: missing('model'), final: missing('final'), cut: null };
}

// The full bar is the probability after all settings, the thin one that of the model.
function Track({ model, final }) {
  return html`<span class="track" aria-hidden="true"><i style=${{ width: `${100 * final}%` }}></i>
    <i class="base" style=${{ width: `${100 * model}%` }}></i></span>`;
}

// The tokens that may be drawn, side by side from 0 to 1 in the order of their ids: [{label, below, p, isDrawn}].
function cutLine(probs, labels, drawn) {
  let below = 0;
  const segments = [];
  probs.forEach((p, id) => {
    if (p >= MIN_SEGMENT || id === drawn.id) segments.push({ label: labels.get(id) ?? '', below, p, isDrawn: id === drawn.id });
    below += p;
  });
  return segments;
}

function Line({ drawn }) {
  return html`<div class="line" aria-hidden="true">${drawn.segments.map(({ label, below, p, isDrawn }) => html`<i class=${isDrawn ? 'drawn' : ''}
    style=${{ left: `${100 * below}%`, width: `${100 * p}%` }}>${p > 0.05 ? label : ''}</i>`)}<b style=${{ left: `${100 * drawn.u}%` }}></b></div>
    <div class="line-ends soft" aria-hidden="true"><span>0</span><span>1</span></div>`;
}

// `start`: the ids before the paths; none while the tokens are on their way.
function TreeTools({ tree, current, start, model }) {
  const places = layOut(tree, current);
  const nodes = places.map(({ ids, node }) => ({ ids, token: node.label, probability: node.p }));
  const leaves = places.filter(({ ids }) => !places.some((other) => other.ids.length > ids.length && ids.every((id, i) => id === other.ids[i])));
  return html`<${Tools} name="paths" isReady=${start.length > 0} svg=${() => drawTree(places, current, T.next.tree)} data=${() => ({ text: tree.text, nodes })}
    rows=${() => [['path', 'token', 'probability'], ...nodes.map(({ ids, token, probability }) => [ids.join(' '), token, probability])]}
    python=${() => pythonTree(pythonLoad(model), leaves.map(({ ids }) => [[...start, ...ids], ids.length]))} />`;
}
