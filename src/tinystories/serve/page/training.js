// Training: how did it learn? The curves of runs while they train, what they said, and how they read a text.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { isDark, shade } from './colors.js';
import { Chart, shorten } from './curves.js';
import { drawCurves, drawSamples } from './drawcurves.js';
import { drawWords } from './drawing.js';
import { Tools } from './figures.js';
import { useLive } from './live.js';
import { pythonCheckpoints, pythonCurves, pythonSamples } from './python.js';
import { runPath, Segments, sideColors, useGet, useRunList } from './runs.js';
import { LAB as T } from './texts.js';
import { bits, Chips, percent } from './tokens.js';
import { html, useEffect, useMemo, useState } from './ui.js';

const MAX_BITS = 10;
const N_ROWS = 30; // of the table
const MEASURES = { bits: ['bits_per_byte', 'val_bits_per_byte'], loss: ['loss', 'val_nats_per_token'] };
const FIELDS = ['step', 'tokens', 'seconds', 'loss', 'bits_per_byte', 'learning_rate', 'grad_norm', 'val_nats_per_token', 'val_bits_per_byte'];
const AXES = { steps: (r) => r.step, tokens: (r) => r.tokens ?? 0, minutes: (r) => (r.seconds ?? 0) / 60 };

export function TrainingPane({ tokens, state, go, fail, attempt }) {
  const [find, setFind] = useState('');
  const list = useRunList(find, attempt, fail);
  const L = T.training;
  const name = state.run ?? list?.runs[0]?.name ?? null;
  // What is chosen of a run names the run, so that it stays when another one becomes the first of the list.
  const goInRun = (changes, options) => go({ run: name, ...changes }, options);
  const search = (text) => {
    if (name !== null) goInRun({}, { replace: true });
    setFind(text);
  };
  const other = state.with && state.with !== name ? state.with : null;
  const names = [name, other].filter((one) => one !== null);
  const { feeds, isOpen } = useLive(names, fail, attempt);
  const feed = feeds[name];
  const details = useGet(name && runPath(name), `${feed?.nChanges} ${attempt}`, fail);
  if (!list) return html`<section class="pane" aria-label=${L.name}><h2>${L.question}</h2></section>`;
  return html`<section class="pane" aria-label=${L.name}>
    <h2>${L.question}</h2><p>${L.explanation}</p>
    ${list.problems.map((problem) => html`<p class="card notice" role="status">${problem}</p>`)}
    ${name === null && !find
      ? html`<p class="card notice" role="status">${list.has_folder ? L.noRuns : L.noFolder} <code>${L.trainCommand}</code></p>`
      : html`<${RunList} list=${list} name=${name} other=${other} find=${find} setFind=${search} go=${go} />`}
    ${feed && names.every((one) => feeds[one]) && html`<${Curves} names=${names} feeds=${feeds} isOpen=${isOpen} state=${state} go=${goInRun}
      facts=${Object.fromEntries(list.runs.map((run) => [run.name, run]))} />`}
    ${details && html`<${Samples} key=${`s ${name}`} details=${details} state=${state} go=${goInRun} />
      <${Reading} key=${`r ${name}`} details=${details} text=${tokens.text} state=${state} go=${goInRun} fail=${fail} attempt=${attempt} />`}
  </section>`;
}

function RunList({ list, name, other, find, setFind, go }) {
  const L = T.training;
  return html`<div class="card">
    <div class="row spread"><h3>${L.runs}</h3><span class="soft">${L.nRuns(list.runs.length, list.n_runs)}</span></div>
    ${(find || list.n_runs > 10) && html`<div class="row"><label for="find">${L.find}</label>
      <input id="find" type="search" value=${find} onInput=${(event) => setFind(event.target.value)} /></div>`}
    <ul class="runs" tabindex=${list.runs.length > 8 ? 0 : null} aria-label=${L.runs}>${list.runs.map((run) => html`<li>
      <button type="button" aria-pressed=${run.name === name} onClick=${() => go({ run: run.name, s: '', ck: '', at: '', with: run.name === other ? '' : (other ?? '') })}>
        <b>${run.name}</b><span class="soft">${L.progress(run)}</span><span class="soft">${L.age(run)}</span></button>
      <label class="with"><input type="checkbox" checked=${run.name === other} disabled=${run.name === name}
        onChange=${(event) => go({ run: name, with: event.target.checked ? run.name : '' })} />
        <span>${L.compare}</span><span class="sr-only"> ${run.name}</span></label></li>`)}</ul>
    ${!list.runs.length && html`<p>${L.notFound}</p>`}</div>`;
}

function Curves({ names, feeds, isOpen, state, go, facts }) {
  const L = T.training;
  const measure = state.y in MEASURES ? state.y : 'bits';
  const axis = state.x in AXES ? state.x : 'steps';
  const dark = isDark();
  const colors = sideColors(dark);
  const [spoken, setSpoken] = useState('');
  const feed = feeds[names[0]];
  const n = feed.train.length;
  const place = /^\d+$/.test(state.at ?? '') ? feed.train.findIndex((r) => r.step >= Number(state.at)) : -1;
  const here = place >= 0 ? place : n - 1;
  const record = feed.train[here];
  const x = AXES[axis];
  const all = names.map((name) => feeds[name]);
  const draw = (keys, colors) => all.flatMap((one, i) => [
    { points: one.train.map((r) => [x(r), r[keys[0]] ?? null]), color: colors[i], dash: i ? [6, 4] : null, width: keys[1] ? 1 : 1.5, dots: false },
    ...(keys[1] ? [{ points: one.evals.map((r) => [x(r), r[keys[1]] ?? null]), color: colors[i], dash: i ? [6, 4] : null, width: 2.5, dots: true }] : []),
  ]);
  const deps = [axis, measure, dark, ...all.flatMap((one) => [one.train, one.evals])];
  const main = useMemo(() => draw(MEASURES[measure], colors), deps);
  const rates = useMemo(() => draw(['learning_rate'], colors), deps);
  const norms = useMemo(() => draw(['grad_norm'], colors), deps);
  const picture = () => {
    const [paper, xLabel] = [sideColors(false), L.axes[axis]];
    const legend = names.map((name, i) => ({ color: paper[i], dash: i ? [6, 4] : null, training: L.training(name), validation: L.validation }));
    const others = [{ lines: draw(['learning_rate'], paper), xLabel, title: L.rate }, { lines: draw(['grad_norm'], paper), xLabel, title: L.norm }];
    return drawCurves({ legend, main: { lines: draw(MEASURES[measure], paper), xLabel, yLabel: L.measureLabels[measure] }, others, title: L.figure(names) });
  };
  const records = () => names.map((name) => ({ run: name, stride: feeds[name].stride, training: feeds[name].train, evaluations: feeds[name].evals, final: feeds[name].final }));
  const listRecords = () => records().flatMap(({ run, training, evaluations }) => [...training, ...evaluations].sort((a, b) => a.step - b.step).map((r) => [run, ...FIELDS.map((field) => r[field])]));
  const point = (value) => {
    if (!n) return;
    const nearest = feed.train.reduce((best, r, i) => (Math.abs(x(r) - value) < Math.abs(x(feed.train[best]) - value) ? i : best), 0);
    if (nearest !== here) go({ at: nearest === n - 1 ? '' : feed.train[nearest].step }, { replace: true });
  };
  const latest = feed.evals.at(-1);
  useEffect(() => { if (latest) setSpoken(L.evaluated(latest)); }, [latest?.step]);
  const chart = (lines, yLabel, height, key) => html`<${Chart} key=${`${key} ${names.join('\n')}`} lines=${lines} xLabel=${L.axes[axis]} yLabel=${yLabel}
    height=${height} dark=${dark} at=${record && x(record)} onPoint=${point} label=${L.chartLabel(yLabel, names, all)} />`;
  return html`<div class="card curves">
    <div class="row spread"><h3>${names.join(L.and)}</h3><span class="soft">${isOpen ? L.live(facts[names[0]]) : L.connecting}</span></div>
    ${names.flatMap((name) => L.problemsOf(name, feeds[name])).map((problem) => html`<p class="notice small" role="status">${problem}</p>`)}
    <div class="row controls"><${Segments} label=${L.measure} name="measure" options=${L.measures} value=${measure} onChange=${(y) => go({ y }, { replace: true })} />
      <${Segments} label=${L.axis} name="axis" options=${L.axes} value=${axis} onChange=${(key) => go({ x: key }, { replace: true })} /></div>
    <ul class="lines">${names.map((name, i) => html`<li style=${{ '--side': colors[i] }} class=${i ? 'dashed' : ''}><i class="thin"></i>${L.training(name)}<i></i>${L.validation}</li>`)}</ul>
    ${chart(main, L.measureLabels[measure], 300, 'main')}
    <div class="halves"><div><h4>${L.rate}</h4>${chart(rates, '', 150, 'rate')}</div><div><h4>${L.norm}</h4>${chart(norms, '', 150, 'norm')}</div></div>
    ${record && html`<div class="slider wide"><label for="at">${L.at}</label>
      <input id="at" type="range" min="0" max=${n - 1} value=${here} aria-valuetext=${L.point(record)}
        onInput=${(event) => go({ at: Number(event.target.value) === n - 1 ? '' : feed.train[event.target.value].step }, { replace: true })} />
      <output for="at">${L.point(record)}</output></div>
    <${Tools} name="curves" svg=${picture} data=${records} rows=${() => [['run', ...FIELDS], ...listRecords()]} python=${() => pythonCurves(names)} />`}
    <div class="scroll" tabindex="0"><table class="facts-table"><thead><tr><th>${L.run}</th>${L.columns.map((column) => html`<th scope="col">${column}</th>`)}</tr></thead>
      <tbody>${names.map((name) => html`<tr><th scope="row">${name}</th>${summarize(feeds[name]).map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody></table></div>
    <p class="soft">${names.length > 1 ? L.compared(names, all) : L.howToRead}</p>
    <details><summary>${L.asTable}</summary><div class="scroll"><table><thead><tr>${L.tableColumns.map((column) => html`<th scope="col">${column}</th>`)}</tr></thead>
      <tbody>${names.flatMap((name) => thin(feeds[name]).map((r) => html`<tr><td>${name}</td><td>${r.step}</td><td>${r.tokens}</td><td>${shorten((r.seconds ?? 0) / 60)}</td>
        <td>${shorten(r.loss)}</td><td>${shorten(r.bits_per_byte)}</td><td>${shorten(r.val_bits_per_byte)}</td><td>${shorten(r.learning_rate)}</td><td>${shorten(r.grad_norm)}</td></tr>`))}</tbody></table></div></details>
    <div class="sr-only" aria-live="polite">${spoken}</div>
  </div>`;
}

// Steps, tokens, minutes, latest training value, latest and best validation, final score.
function summarize({ train, evals, final }) {
  const last = train.at(-1);
  const scores = evals.map((r) => r.val_bits_per_byte).filter((score) => score !== null && score !== undefined);
  const best = scores.length ? Math.min(...scores) : null;
  return [last?.step ?? '–', last?.tokens?.toLocaleString('en') ?? '–', last ? shorten((last.seconds ?? 0) / 60) : '–', shorten(last?.bits_per_byte),
    shorten(scores.at(-1)), best === null ? '–' : `${shorten(best)} (${evals.find((r) => r.val_bits_per_byte === best).step})`, shorten(final?.val_bits_per_byte)];
}

// Evenly spaced points, and all evaluations up to as many, in the order of their steps.
function thin({ train, evals }) {
  const some = (rows) => rows.filter((_, i) => i === rows.length - 1 || i % Math.max(1, Math.ceil(rows.length / N_ROWS)) === 0);
  return [...some(train), ...some(evals)].sort((a, b) => a.step - b.step);
}

// A slider over steps, with the steps named.
function StepSlider({ id, label, steps, value, onPick, describe }) {
  const index = Math.max(0, steps.indexOf(value));
  return html`<div class="slider wide"><label for=${id}>${label}</label>
    <input id=${id} type="range" min="0" max=${steps.length - 1} value=${index} disabled=${steps.length < 2} aria-valuetext=${describe(steps[index])}
      onInput=${(event) => onPick(steps[event.target.value])} /><output for=${id}>${describe(steps[index])}</output></div>`;
}

const listNext = ({ next }) => next.map(([id, token, probability]) => ({ id, token, probability }));
const chosenStep = (text, steps) => (steps.includes(Number(text)) && text !== '' ? Number(text) : steps.at(-1));

function Samples({ details, state, go }) {
  const L = T.training;
  const problems = details.problems.map((problem) => html`<p class="soft">${problem}</p>`);
  if (!details.samples.length) return html`<div class="card"><h3>${L.samples}</h3>${problems}<p class="soft">${L.noSamples}</p></div>`;
  const steps = [...new Set(details.samples.map((section) => section.step))];
  const step = chosenStep(state.s ?? '', steps);
  const section = details.samples.findLast((one) => one.step === step);
  return html`<div class="card"><h3>${L.samples}</h3>${problems}
    <${StepSlider} id="sample" label=${L.samplesHint} steps=${steps} value=${step} describe=${L.afterStep}
      onPick=${(s) => go({ s: s === steps.at(-1) ? '' : s }, { replace: true })} />
    <p class="soft">${section.score}</p>
    <div class="samples" aria-live="polite">${section.stories.map((story) => html`<blockquote>${story}</blockquote>`)}</div>
    <${Tools} name="samples" svg=${() => drawSamples(section.stories, L.samplesFigure(details.name, step))} data=${() => ({ run: details.name, ...section })}
      rows=${() => [['run', 'step', 'story'], ...section.stories.map((story) => [details.name, step, story])]} python=${() => pythonSamples(details.name, step)} /></div>`;
}

function Reading({ details, text, state, go, fail, attempt }) {
  const L = T.training;
  const [pointed, setPointed] = useState(null);
  const [kept, setKept] = useState({}); // answers for this text, by step
  const steps = details.checkpoints;
  const step = steps.length ? chosenStep(state.ck ?? '', steps) : null;
  const known = kept.text === text ? kept[step] : null;
  const question = step === null || known ? null : { text, step, top: 5, attempt };
  const answer = useAnswer((_, { attempt: ignored, ...body }) => ask(`${runPath(details.name)}/score`, body), '', question, fail);
  useEffect(() => {
    if (answer) setKept((before) => ({ ...(before.text === answer.body.text ? before : { text: answer.body.text }), [answer.body.step]: answer.data }));
  }, [answer]);
  const data = known ?? (answer?.body.text === text ? answer.data : null); // the chips stay while a checkpoint is read
  const dark = isDark();
  const keep = html`<p class="soft">${L.kept(steps, details)} <code>${L.keepCommand}</code></p>`;
  if (step === null) return html`<div class="card"><h3>${L.reading}</h3><p>${L.noCheckpoints}</p>${keep}</div>`;
  const look = (i) => {
    const surprise = data.surprise_bits[i];
    return surprise === null ? { title: T.words.first } : { style: shade(surprise / MAX_BITS, dark), title: `${bits(surprise)}, ${percent(2 ** -surprise)}` };
  };
  const scored = steps.filter((one) => kept.text === text && kept[one]);
  const listTokens = () => data.pieces.map(({ id, label }, i) => ({ place: i, id, token: label, surprise_bits: data.surprise_bits[i], rank: data.ranks[i] }));
  const python = (some) => pythonCheckpoints(details.name, some, text, data.n_dropped);
  return html`<div class="card"><h3>${L.reading}</h3><p>${L.readingHint}</p>
    <${StepSlider} id="checkpoint" label=${L.checkpoint} steps=${steps} value=${step} describe=${L.afterStep}
      onPick=${(ck) => go({ ck: ck === steps.at(-1) ? '' : ck }, { replace: true })} />
    ${data && html`<div data-step=${known ? step : ''} class="reading">
      <${Chips} pieces=${data.pieces} selected=${null} look=${look} onPick=${setPointed} onPoint=${setPointed} label=${L.chips} />
      <p class="total">${data.bits_per_byte !== null && html`${T.words.bitsPerByte} <b>${data.bits_per_byte.toFixed(3)}</b> · `}${pointed === null || !data.pieces[pointed] ? L.pointAt
        : html`<b>${data.pieces[pointed].label}</b> ${look(pointed).title}`}</p>
      <p>${L.nextWords} ${data.next.map(([, label, p], i) => html`${i ? ', ' : ''}<b>${label}</b> ${percent(p)}`)}</p>
      <${Tools} name="reading" isReady=${Boolean(known)} svg=${() => drawWords(data.pieces, data.surprise_bits, MAX_BITS, L.readingFigure(details.name, step, data))}
        data=${() => ({ run: details.name, step, text, bits_per_byte: data.bits_per_byte, mean_bits: data.mean_bits, tokens: listTokens(), next: listNext(data) })}
        rows=${() => [['place', 'id', 'token', 'surprise_bits', 'rank'], ...listTokens().map(Object.values)]} python=${() => python([step])} /></div>`}
    ${scored.length > 1 && html`<details><summary>${L.readingTable}</summary><table><thead><tr><th>${L.step}</th><th>${T.words.bitsPerByte}</th><th>${L.likeliest}</th></tr></thead><tbody>
      ${scored.map((one) => html`<tr><td>${one}</td><td>${kept[one].bits_per_byte?.toFixed(3) ?? '–'}</td><td>${kept[one].next[0][1]} ${percent(kept[one].next[0][2])}</td></tr>`)}</tbody></table>
      <${Tools} name="checkpoints" data=${() => scored.map((one) => ({ step: one, bits_per_byte: kept[one].bits_per_byte, next: listNext(kept[one]) }))}
        rows=${() => [['step', 'bits_per_byte', 'likeliest', 'probability'], ...scored.map((one) => [one, kept[one].bits_per_byte, ...kept[one].next[0].slice(1)])]}
        python=${() => python(scored)} /></details>`}
    ${keep}</div>`;
}
