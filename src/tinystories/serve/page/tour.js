// The tour: seven questions about the text, each to be guessed before a pane shows the answer.
import { ask, Failure } from './api.js';
import { analyze, decodeNext } from './sampling.js';
import { LAB as T } from './texts.js';
import { bits, percent } from './tokens.js';
import { html, keep, useEffect, useRef, useState, WRITING } from './ui.js';

const MIN_TOKENS = 8; // of a text that the tour can ask about
const SAME_BITS = 0.01; // a change of surprise that is none
const COLD = 0.3; // temperature
const R = T.tour;

// The steps. `prepare` returns {question, choices, answer (index), because, before, after (changes of the page, with the
// question and with the answer)}. The pane is hidden until the guess, unless it does not give the answer away (isOpen).
const STEPS = [
  { pane: 'words', prepare: askTokens },
  { pane: 'words', prepare: askSurprise },
  { pane: 'next', prepare: askLikeliest },
  { pane: 'next', prepare: askTemperature, isOpen: true },
  { pane: 'attention', prepare: askHead },
  { pane: 'attention', prepare: askAblation },
  { pane: 'inside', prepare: askLayer },
];

async function askTokens({ tokens }) {
  const n = tokens.pieces.length;
  const choices = [Math.round(n / 2), n, Math.round(n * 1.7)].map(String);
  return { question: R.tokens.question, choices, answer: 1, because: R.tokens.because(n, tokens.text.length) };
}

async function askSurprise({ tokens }) {
  const score = await ask('/lab/api/score', { ids: tokens.ids });
  const order = score.surprise_bits.map((b, i) => [b ?? -1, i]).sort((a, b) => b[0] - a[0]).map(([, i]) => i);
  const worst = order[0];
  const label = (i) => tokens.pieces[i].label;
  const easy = order.slice(Math.floor(order.length / 2));
  const places = pickDistinct([worst, ...easy], label).sort((a, b) => a - b);
  const b = score.surprise_bits[worst];
  const because = R.surprise.because(label(worst), bits(b), percent(2 ** -b));
  return { question: R.surprise.question, choices: places.map(label), answer: places.indexOf(worst), because, after: { c: tokens.pieces[worst].end - 1 } };
}

async function askLikeliest({ tokens }) {
  const { candidates } = await askNext(tokens);
  const [best, fourth, ninth] = [candidates[0], candidates[3], candidates[8]];
  const because = R.next.because(best.label, percent(best.model_prob));
  return { question: R.next.question, choices: [fourth, best, ninth].map(({ label }) => label), answer: 1, because };
}

async function askTemperature({ tokens, state, model }) {
  const answer = await askNext(tokens);
  const { logits, seen } = decodeNext(answer);
  const temperature = Number(state.temp) || model.sampling.temperature;
  const shareAt = (value) => analyze(logits, { ...model.sampling, temperature: value }, seen).final[answer.candidates[0].id];
  const shares = [shareAt(temperature), shareAt(COLD)];
  const change = Math.sign(Math.round(1000 * (shares[1] - shares[0])));
  const because = R.temperature.because(...shares.map(percent));
  return { question: R.temperature.question(temperature), choices: R.temperature.choices, answer: 1 - change, because, after: { temp: COLD } };
}

async function askHead({ tokens }) {
  const summary = await ask('/lab/api/heads', { ids: tokens.ids });
  const [l, h] = strongest(summary.previous);
  const shares = Object.keys(R.head.choices).map((name) => summary[name][l][h]);
  const answer = shares.indexOf(Math.max(...shares));
  return { question: R.head.question(l, h), choices: Object.values(R.head.choices), answer, because: R.head.because(percent(shares[answer])), before: { l, h, off: '', temp: '' } };
}

async function askAblation({ tokens }) {
  const { previous } = await ask('/lab/api/heads', { ids: tokens.ids });
  const [l, h] = strongest(previous);
  const answer = await ask('/lab/api/ablate', { ids: tokens.ids, heads: [[l, h]] });
  const cost = answer.ablated_mean_bits - answer.mean_bits;
  const name = Math.abs(cost) < SAME_BITS ? 'same' : cost > 0 ? 'harder' : 'easier';
  const because = R.ablation.because(bits(answer.mean_bits), bits(answer.ablated_mean_bits));
  return { question: R.ablation.question, choices: Object.values(R.ablation.choices), answer: Object.keys(R.ablation.choices).indexOf(name), because,
    before: { l, h }, after: { off: `${l}.${h}` } };
}

async function askLayer({ tokens }) {
  const n = tokens.ids.length;
  const lens = await ask('/lab/api/lens', { ids: tokens.ids, start: n - 1, stop: n, top: 5 });
  const first = lens.final_ranks.findIndex(([rank]) => rank === 1);
  const last = lens.stages.length - 1;
  const stages = [...new Set([0, Math.floor(last / 2), last, first])].sort((a, b) => a - b);
  return { question: R.inside.question(lens.labels[lens.final_ids[0]]), choices: stages.map((s) => lens.stages[s]), answer: stages.indexOf(first),
    because: R.inside.because, before: { off: '', to: '' }, after: { cell: `${first}.${n - 1}` } };
}

const askNext = ({ ids }) => ask('/lab/api/next', { ids, top: 40, logits: true });

// The [layer, head] with the largest number.
function strongest(rows) {
  const best = Math.max(...rows.flat());
  const layer = rows.findIndex((row) => row.includes(best));
  return [layer, rows[layer].indexOf(best)];
}

// The first three items with different names.
function pickDistinct(items, nameOf) {
  const names = items.map(nameOf);
  return items.filter((_, i) => names.indexOf(names[i]) === i).slice(0, 3);
}

// `isFresh`: the tokens are those of the newest text. `onHide(pane)`: this pane would give the answer away; null: none does. `onEnd`: the tour is over.
export function Tour({ tokens, state, model, go, isFresh, attempt, onHide, onEnd }) {
  const [number, setNumber] = useState(0);
  const [step, setStep] = useState(null);
  const [guess, setGuess] = useState(null);
  const [failed, setFailed] = useState(null);
  const heading = useRef(null);
  const onward = useRef(null);
  const isShort = tokens.pieces.length < MIN_TOKENS;
  const hasBegun = useRef(false);

  useEffect(() => {
    setStep(null);
    setGuess(null);
    setFailed(null);
    if (isShort) {
      if (!hasBegun.current) go({ t: T.example, a: '', c: '' }); // later on, somebody is typing
      hasBegun.current = true;
      return undefined;
    }
    hasBegun.current = true;
    let isCurrent = true;
    const { pane, prepare, isOpen } = STEPS[number];
    onHide(isOpen ? null : pane);
    prepare({ tokens, state, model }).then((prepared) => {
      if (!isCurrent) return;
      setStep(prepared);
      go({ p: pane, c: '', ...prepared.before }, { replace: true });
    }, (error) => {
      if (!(error instanceof Failure)) throw error;
      if (!isCurrent) return;
      if (error.kind === 'recorded' && number + 1 < STEPS.length) setNumber(number + 1); // not part of this recording
      else setFailed(error);
    });
    return () => { isCurrent = false; };
  }, [number, tokens.ids.join(), attempt]);

  useEffect(() => {
    const onKey = (event) => event.key === 'Escape' && !document.querySelector('dialog[open]') && !event.target.matches(WRITING) && end();
    addEventListener('keydown', onKey);
    return () => {
      removeEventListener('keydown', onKey);
      onHide(null);
    };
  }, []);

  useEffect(() => {
    if (number > 0) heading.current?.focus(); // at a first visit, the page does not take the focus
  }, [step]);

  useEffect(() => {
    onward.current?.focus(); // the button that was chosen cannot hold the focus any more
  }, [guess]);

  function choose(i) {
    setGuess(i);
    onHide(null);
    if (step.after) go(step.after, { replace: true });
  }

  function end() {
    keep('tour', 'done');
    onEnd();
  }

  const isLast = number === STEPS.length - 1;
  return html`<section class="card tour" aria-label=${R.label}>
    <div class="row"><h2 tabindex="-1" ref=${heading}>${R.step(number + 1, STEPS.length)}</h2>
      <button type="button" class="plain" onClick=${end}>${R.skip}</button></div>
    ${failed ? html`<p role="alert">${R.failed}</p>` : isShort ? html`<p role="status">${R.tooShort(MIN_TOKENS)}</p>` : !step ? html`<p class="soft">${R.waiting}</p>` : html`<p>${step.question}</p>
      <div class="row guesses" role="group" aria-label=${R.guess}>${step.choices.map((choice, i) => html`<button type="button" disabled=${guess !== null || !isFresh}
        class=${guess === null ? '' : i === step.answer ? 'answer' : i === guess ? 'guess' : ''} onClick=${() => choose(i)}>${choice}</button>`)}</div>
      ${guess === null
        ? html`<p class="soft">${R.guess}</p>`
        : html`<p role="status"><b>${guess === step.answer ? R.right : R.wrong(step.choices[step.answer])}</b> ${step.because}${isLast && html` ${R.end}`}</p>
          <div class="row"><button type="button" class="primary" ref=${onward} onClick=${isLast ? end : () => setNumber(number + 1)}>${isLast ? R.finish : R.onward}</button></div>`}`}
  </section>`;
}
