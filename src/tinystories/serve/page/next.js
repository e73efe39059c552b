// Next word: what could come next? Bars before and after each sampling setting.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { LAB as T } from './texts.js';
import { KNOBS, percent } from './shared.js';
import { html, moveInGroup, useEffect, useRef, useState } from './ui.js';

const N_BARS = 12;

export function NextPane({ tokens, state, go, model, fail, attempt, latest }) {
  const [drawn, setDrawn] = useState(null);
  const [spoken, setSpoken] = useState('');
  const current = useRef(null); // what key handlers see
  const isDrawing = useRef(false);
  const N = T.next;

  function valueOf({ name, key, min, max }) {
    const value = Number(state[key]);
    return state[key] !== undefined && state[key] !== '' && Number.isFinite(value) ? Math.min(max, Math.max(min, value)) : model.sampling[name];
  }
  const sampling = Object.fromEntries(KNOBS.map((knob) => [knob.name, valueOf(knob)]));
  const answer = useAnswer(ask, '/lab/api/next', { ids: tokens.ids, top: N_BARS, ...sampling, attempt }, fail);
  const isCurrent = answer && answer.body.ids.join() === tokens.ids.join();
  const candidates = answer?.data.candidates ?? [];
  const rest = 1 - candidates.reduce((sum, c) => sum + c.model_prob, 0);
  const finalRest = 1 - candidates.reduce((sum, c) => sum + c.final_prob, 0);
  const longest = Math.max(0.01, rest, finalRest, ...candidates.flatMap((c) => [c.model_prob, c.final_prob]));
  const appended = (state.a ?? '').split(',').filter(Boolean);

  function choose(candidate) {
    const before = (latest.current.a ?? '').split(',').filter(Boolean);
    setSpoken(candidate.label);
    go({ a: [...before, candidate.id].join(','), c: '' });
  }

  async function draw() {
    if (isDrawing.current || !current.current.isCurrent) return;
    isDrawing.current = true;
    const seed = /^\d{1,15}$/.test(state.seed ?? '') ? Number(state.seed) : 1;
    try {
      const step = await ask('/lab/api/step', { ids: current.current.ids, ...current.current.sampling, seed, index: current.current.nAppended });
      setDrawn(step);
      choose(step);
      fail(null);
    } catch (error) {
      fail(error);
    } finally {
      isDrawing.current = false;
    }
  }

  function rewind() {
    const before = (latest.current.a ?? '').split(',').filter(Boolean);
    setDrawn(null);
    if (before.length) {
      go({ a: before.slice(0, -1).join(','), c: '' });
    } else {
      const last = current.current.pieces.at(-1);
      if (current.current.pieces.length > 1) go({ t: current.current.text.slice(0, last.start), a: '', c: '' });
    }
  }

  current.current = { isCurrent, candidates, sampling, ids: tokens.ids, pieces: tokens.pieces, text: tokens.text, nAppended: appended.length, choose, draw, rewind };
  useEffect(() => {
    const onKey = (event) => {
      if (event.target.matches('textarea, input') || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
      const now = current.current;
      if (/^[1-9]$/.test(event.key) && now.isCurrent && now.candidates[event.key - 1]) now.choose(now.candidates[event.key - 1]);
      else if (event.key === ' ' && !event.target.matches('button, a, summary')) now.draw();
      else if (event.key.toLowerCase() === 'r') now.rewind();
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', onKey);
    return () => removeEventListener('keydown', onKey);
  }, []);

  return html`<section class="pane" aria-label=${N.name}>
    <h2>${N.question}</h2><p>${N.explanation}</p>
    <p class="card tail"><span class="soft">… </span>${tokens.text.slice(-160)}<b> ▁</b></p>
    <div class="split">
      <div class="card"><div class="bars" role="group" aria-label=${N.bars} data-text=${isCurrent ? tokens.text : ''} onKeyDown=${moveInGroup}>${candidates.map(
        (c, i) => html`<button type="button" class=${c.cut_by ? 'bar cut' : 'bar'} data-item tabindex=${i ? -1 : 0} data-id=${c.id}
            aria-label=${`${c.label}: ${N.model} ${percent(c.model_prob)}, ${c.cut_by ? N.cutBy(c.cut_by) : `${N.final} ${percent(c.final_prob)}`}`}
            onClick=${() => isCurrent && choose(c)}>
          <kbd>${i < 9 ? i + 1 : ''}</kbd><span class="label">${c.label}</span><${Track} base=${c.model_prob / longest} final=${c.final_prob / longest} />
          <span class="number">${percent(c.model_prob)} → ${c.cut_by ? N.cutBy(c.cut_by) : percent(c.final_prob)}</span></button>`,
      )}${answer && html`<div class="bar"><kbd></kbd><span class="label soft">${N.others}</span><${Track} base=${rest / longest} final=${finalRest / longest} />
        <span class="number">${percent(Math.max(0, rest))} → ${percent(Math.max(0, finalRest))}</span></div>`}</div>
        <p class="soft">${N.legend}</p></div>
      <aside class="card knobs">${KNOBS.map((knob) => html`<div class="knob"><label for=${knob.key}>${N.knobs[knob.name]}</label>
          <output for=${knob.key}>${N.show(knob.name, valueOf(knob))}</output>
          <input id=${knob.key} type="range" min=${knob.min} max=${knob.max} step=${knob.step} value=${valueOf(knob)}
            onInput=${(event) => go({ [knob.key]: event.target.value }, { replace: true })} /></div>`)}
        ${answer && html`<p class="soft">${N.kept(answer.data.n_kept, model.vocab_size, answer.data.entropy_bits)}</p>`}
        <div class="row"><button type="button" class="primary" onClick=${draw}>${N.draw}</button>
          <button type="button" onClick=${rewind}>${N.rewind}</button></div>
        ${drawn && html`<div><span class="soft">${N.drawn(drawn)}</span><div class="strip" aria-hidden="true">
          <i style=${{ left: `${100 * drawn.below}%`, width: `${100 * drawn.final_prob}%` }}></i><b style=${{ left: `${100 * drawn.u}%` }}></b></div></div>`}
      </aside>
    </div>
    <div class="sr-only" aria-live="polite">${spoken}</div>
  </section>`;
}

// The full bar is the probability after all settings, the thin one that of the model.
function Track({ base, final }) {
  return html`<span class="track" aria-hidden="true"><i style=${{ width: `${100 * Math.max(0, final)}%` }}></i>
    <i class="base" style=${{ width: `${100 * Math.max(0, base)}%` }}></i></span>`;
}
