// What could come next? Bars before and after the settings; choose one, or draw one.
import { KNOBS, moveInGroup, percent } from '../../../serve/page/shared.js';
import { LAB } from '../../../serve/page/texts.js';

const N_BARS = 12;
const N = LAB.next;

// An element with attributes, listeners (names that begin with "on") and children.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children);
  return element;
}

// The pane, an element with show(text). `ask(question)` returns the answer of Storyteller.whatNext, `settings` are the model's.
export function makeNextPane({ ask, settings: modelSettings, vocabSize, getSeed, fail }) {
  const settings = { ...modelSettings };
  let text = '';
  let appended = [];
  let answer = null; // to the newest question; null while it is computed
  let asked = 0;
  let takesFocus = false; // the bars do when they come, after a word was chosen

  const tail = make('p', { class: 'card tail' });
  const bars = make('div', { class: 'bars', role: 'group', 'aria-label': N.bars, onkeydown: moveInGroup });
  const kept = make('p', { class: 'soft' });
  const drawn = make('div');
  const spoken = make('div', { class: 'sr-only', 'aria-live': 'polite' });
  const knobs = KNOBS.map((knob) => {
    const output = make('output', { for: knob.key });
    const { key: id, min, max, step } = knob;
    const input = make('input', { id, type: 'range', min, max, step, oninput: () => {
      settings[knob.name] = Number(input.value);
      update();
    } });
    return { ...knob, input, output, element: make('div', { class: 'knob' }, make('label', { for: id }, N.knobs[knob.name]), output, input) };
  });
  const details = make('details', { class: 'card next', ontoggle: () => details.open && update() },
    make('summary', {}, N.question),
    make('p', {}, N.explanation), tail,
    make('div', { class: 'split' },
      make('div', {}, bars, make('p', { class: 'soft' }, N.legend)),
      make('div', { class: 'knobs' }, ...knobs.map((knob) => knob.element), kept,
        make('div', { class: 'row' }, make('button', { type: 'button', class: 'primary', onclick: draw }, N.draw),
          make('button', { type: 'button', onclick: takeBack }, N.rewind)),
        drawn)),
    spoken);
  details.addEventListener('keydown', onKey);

  async function update({ draws = false } = {}) {
    for (const { name, input, output } of knobs) {
      input.value = settings[name];
      output.textContent = N.show(name, settings[name]);
    }
    if (!details.open) return;
    const number = (asked += 1);
    answer = null;
    const question = { text, appended, settings, top: N_BARS, draw: draws ? { seed: getSeed(), index: appended.length } : null };
    try {
      const result = await ask(question);
      if (number !== asked) return; // a newer question is on its way
      answer = result;
    } catch (error) {
      return fail(error);
    }
    show();
    if (draws) choose(answer.drawn);
  }

  function show() {
    const { candidates, nKept, entropy, tail: added } = answer;
    tail.replaceChildren(make('span', { class: 'soft' }, '… '), (text + added).slice(-160), make('b', {}, ' ▁'));
    const rest = (name) => Math.max(0, 1 - candidates.reduce((sum, candidate) => sum + candidate[name], 0));
    const others = { modelProb: rest('modelProb'), finalProb: rest('finalProb') };
    const longest = Math.max(0.01, ...[others, ...candidates].flatMap((one) => [one.modelProb, one.finalProb]));
    const place = [...bars.children].indexOf(document.activeElement);
    bars.replaceChildren(...candidates.map((candidate, i) => makeBar(candidate, i, longest)), makeRest(others, longest));
    if (place >= 0 || takesFocus) bars.children[Math.min(Math.max(place, 0), candidates.length - 1)].focus({ preventScroll: true });
    takesFocus = false;
    kept.textContent = N.kept(nKept, vocabSize, entropy);
  }

  function makeBar(candidate, i, longest) {
    const { id, label, modelProb, finalProb, cutBy } = candidate;
    const outcome = cutBy ? N.cutBy(cutBy) : percent(finalProb);
    return make('button', {
      type: 'button', class: cutBy ? 'bar cut' : 'bar', 'data-item': true, 'data-id': id, tabindex: i ? -1 : 0,
      'aria-label': `${label}: ${N.model} ${percent(modelProb)}, ${cutBy ? outcome : `${N.final} ${outcome}`}`,
      onclick: () => answer && choose(candidate),
    }, make('kbd', {}, i < 9 ? String(i + 1) : ''), make('span', { class: 'label' }, label), makeTrack(modelProb / longest, finalProb / longest),
    make('span', { class: 'number' }, `${percent(modelProb)} → ${outcome}`));
  }

  function makeRest({ modelProb, finalProb }, longest) {
    return make('div', { class: 'bar' }, make('kbd'), make('span', { class: 'label soft' }, N.others), makeTrack(modelProb / longest, finalProb / longest),
      make('span', { class: 'number' }, `${percent(modelProb)} → ${percent(finalProb)}`));
  }

  // The full bar is the probability after all settings, the thin one that of the model.
  function makeTrack(base, final) {
    const bar = (width, kind) => {
      const element = make('i', { class: kind });
      element.style.width = `${100 * Math.max(0, width)}%`; // not an attribute, which the policy forbids
      return element;
    };
    return make('span', { class: 'track', 'aria-hidden': 'true' }, bar(final, 'final'), bar(base, 'base'));
  }

  function choose({ id, label, u, below, finalProb }) {
    drawn.replaceChildren();
    if (u !== undefined) {
      const strip = make('div', { class: 'strip', 'aria-hidden': 'true' }, make('i'), make('b'));
      Object.assign(strip.firstChild.style, { left: `${100 * below}%`, width: `${100 * finalProb}%` });
      strip.lastChild.style.left = `${100 * u}%`;
      drawn.append(make('span', { class: 'soft' }, N.drawn({ u, label, final_prob: finalProb })), strip);
    }
    spoken.textContent = label;
    appended = [...appended, id];
    update();
  }

  function draw() {
    if (answer) update({ draws: true });
  }

  function takeBack() {
    drawn.replaceChildren();
    if (appended.length) appended = appended.slice(0, -1);
    else text = text.replace(/\s*\S+\s*$/, '');
    update();
  }

  function onKey(event) {
    if (event.target.matches('input, summary') || event.ctrlKey || event.metaKey || event.altKey) return;
    const candidate = /^[1-9]$/.test(event.key) && answer?.candidates[event.key - 1];
    if (candidate) choose(candidate);
    else if (event.key === ' ' && !event.target.matches('button:not(.bar)')) draw();
    else if (event.key.toLowerCase() === 'r') takeBack();
    else return;
    event.preventDefault();
  }

  return {
    element: details,
    // Show what could come after a text; with `open`, also open the pane.
    show(newText, { open = false } = {}) {
      text = newText;
      appended = [];
      drawn.replaceChildren();
      if (open) {
        details.open = true;
        details.scrollIntoView({ block: 'start' });
        takesFocus = true;
      }
      update();
    },
  };
}
