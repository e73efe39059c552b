// Experiments: two texts, two models, a quiz, tokenizers.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { isDark, shade } from './colors.js';
import { drawDuel, drawPieces, drawSides } from './drawsides.js';
import { Tools } from './figures.js';
import { pythonApart, pythonDuel, pythonLoad, pythonOther, pythonPieces, pythonReadings, pythonTwoModels, pythonTwoTexts } from './python.js';
import { QuizTab } from './quiz.js';
import { runPath, Segments, sideColors, useGet, useRunList } from './runs.js';
import { LAB as T } from './texts.js';
import { bits, Chips, percent, readLabel } from './tokens.js';
import { html, useState } from './ui.js';

const TABS = { prompts: PromptsTab, models: ModelsTab, quiz: QuizTab, tokens: TokensTab };
const MAX_BITS = 10;
const N_NEXT = 10;
const N_ROWS = 14;

export function ExperimentsPane(props) {
  const X = T.experiments;
  const { state, go } = props;
  const tab = state.e in TABS ? state.e : 'prompts';
  const Tab = TABS[tab];
  return html`<section class="pane" aria-label=${X.name}>
    <h2>${X.question}</h2><p>${X.explanation}</p>
    <${Segments} label=${X.tabs} name="experiment" options=${Object.fromEntries(Object.keys(TABS).map((key) => [key, X[key].name]))}
      value=${tab} onChange=${(e) => go({ e })} />
    <h3>${X[tab].question}</h3><p>${X[tab].explanation}</p>
    <${Tab} key=${tab} ...${props} /></section>`;
}

// Bars of the next words on both sides: blue above, orange below, and the difference in points of percent.
// `longNames` are those in a saved picture, where the page is not beside it.
function Duel({ rows, names, longNames = names, overlap, data, traces }) {
  const X = T.experiments;
  const titles = names.map((name, i) => `${X.side(i)}: ${name}`);
  const colors = sideColors(isDark());
  const longest = Math.max(0.01, ...rows.flatMap((row) => [row.a, row.b]));
  return html`<div class="card" style=${{ '--side-a': colors[0], '--side-b': colors[1] }}><h3>${X.nextTitle}</h3>
    <ul class="lines">${names.map((name, i) => html`<li style=${{ '--side': colors[i] }}><i></i>${titles[i]}</li>`)}</ul>
    <ol class="duel">${rows.map((row) => html`<li aria-label=${X.row(row.label, percent(row.a), percent(row.b))}>
      <span class="label">${row.label}</span><span class="tracks" aria-hidden="true"><i style=${{ width: `${(100 * row.a) / longest}%` }}></i><i style=${{ width: `${(100 * row.b) / longest}%` }}></i></span>
      <span class="number a">${percent(row.a)}</span><span class="number b">${percent(row.b)}</span><span class="number difference">${X.difference(row.b - row.a)}</span></li>`)}</ol>
    <p>${X.overlap(overlap)}</p>
    <${Tools} name="two-sides" svg=${() => drawDuel(rows, longNames.map((name, i) => `${X.side(i)}: ${name}`), X.overlap(overlap), X.difference, X.nextTitle)}
      data=${() => ({ a: nameSide(data.a), b: nameSide(data.b), overlap, next: rows })}
      rows=${() => [['id', 'token', 'a', 'b'], ...rows.map((row) => [row.id, row.label, row.a, row.b])]} python=${() => pythonDuel(traces(), rows)} />
    <details><summary>${X.asTable}</summary><div class="scroll"><table><thead><tr><th>${X.token}</th>${titles.map((title) => html`<th>${title}</th>`)}<th>${X.differenceName}</th></tr></thead>
      <tbody>${rows.map((row) => html`<tr><td>${row.label}</td><td>${percent(row.a)}</td><td>${percent(row.b)}</td><td>${X.difference(row.b - row.a)}</td></tr>`)}</tbody></table></div></details></div>`;
}

// In files, a side has its model and its text.
const nameSide = ({ name, text }) => ({ model: name, text });

const useCompared = (a, b, attempt, fail) => {
  const question = a && b ? { a, b, top: N_NEXT, attempt } : null;
  const answer = useAnswer(ask, '/lab/api/compare', question, fail);
  return answer && question && JSON.stringify(answer.body) === JSON.stringify(question) ? answer.data : null;
};

function PromptsTab({ state, go, model, fail, attempt, tokens }) {
  const X = T.experiments.prompts;
  const second = state.t2 ?? (state.t === T.example ? X.exampleSecond : X.pairs[0][2]);
  const data = useCompared({ text: tokens.text }, { text: second }, attempt, fail);
  return html`<div><label class="soft" for="second">${X.second}</label>
      <textarea id="second" rows="2" value=${second} spellcheck="false" onInput=${(event) => go({ t2: event.target.value || ' ' }, { replace: true })}></textarea></div>
    <div class="row" role="group" aria-label=${X.pairsLabel}>${X.pairs.map(([name, a, b]) => html`<button type="button" class="chip"
      onClick=${() => go({ t: a, t2: b, a: '', c: '' })}>${name}</button>`)}</div>
    ${data?.next && html`<${Duel} rows=${data.next.slice(0, N_ROWS)} names=${X.names} overlap=${data.overlap}
      longNames=${[data.a, data.b].map(({ text }) => (text.length > 90 ? `…${text.slice(-90)}` : text))} data=${data} traces=${() => pythonTwoTexts(model, [data.a, data.b])} />`}
    ${!data && html`<p class="soft" role="status">${T.experiments.loading}</p>`}`;
}

// The second model in the fragment: "compare", or "run NAME", or "run NAME STEP" with the step in another field.
function ModelsTab({ state, go, model, fail, attempt, tokens }) {
  const X = T.experiments.models;
  const list = useRunList('', attempt, fail);
  const compared = useGet('/lab/api/compare', attempt, fail);
  const runs = list?.runs.map((run) => run.name) ?? [];
  const first = compared?.name ? 'compare' : runs.length ? `run ${runs[0]}` : '';
  const chosen = state.m2 ?? first;
  const run = chosen.startsWith('run ') ? chosen.slice(4) : null;
  const details = useGet(run === null ? null : runPath(run), attempt, fail);
  const step = details?.checkpoints.includes(Number(state.m2s)) ? Number(state.m2s) : null;
  const isReady = chosen === 'compare' ? compared?.name : details !== null;
  const other = chosen === 'compare' ? { compare: true } : { run, step };
  const data = useCompared(isReady ? { text: tokens.text } : null, isReady ? { text: tokens.text, ...other } : null, attempt, fail);
  const [pointed, setPointed] = useState(null);
  const traces = () => pythonTwoModels(model, other.compare ? { ...other, name: compared.name } : other, [data.a, data.b]);
  const listTokens = () => ['a', 'b'].flatMap((side) => data[side].pieces.map(({ id, label }, i) => [data[side].name, i, id, label, data[side].surprise_bits[i], data[side].ranks[i]]));
  if (!list || !compared) return null;
  if (!chosen) return html`<p class="card notice" role="status">${X.none} <code>${X.command}</code></p>`;
  return html`<div class="card row"><label for="second-model">${X.second}</label>
      <select id="second-model" onChange=${(event) => go({ m2: event.target.value, m2s: '' })}>
        ${compared.name && html`<option value="compare" selected=${chosen === 'compare'}>${compared.name}</option>`}
        ${[...new Set([...runs, ...(run === null ? [] : [run])])].map((name) => html`<option value=${`run ${name}`} selected=${name === run}>${X.runOption(name)}</option>`)}</select>
      ${details?.checkpoints.length > 0 && html`<label for="second-step">${X.step}</label><select id="second-step" onChange=${(event) => go({ m2: chosen, m2s: event.target.value })}>
        <option value="" selected=${step === null}>${X.newest}</option>
        ${details.checkpoints.map((one) => html`<option value=${one} selected=${one === step}>${one}</option>`)}</select>`}</div>
    ${data && html`<div class="card"><div class="scroll" tabindex="0"><table class="facts-table"><thead><tr><th>${X.model}</th><th>${T.words.nTokens}</th><th>${T.words.bitsPerByte}</th><th>${T.words.meanBits}</th></tr></thead>
        <tbody>${['a', 'b'].map((side, i) => html`<tr><th scope="row">${T.experiments.side(i)}: ${data[side].name}</th><td>${data[side].pieces.length}</td>
          <td>${data[side].bits_per_byte?.toFixed(3) ?? '–'}</td><td>${data[side].mean_bits?.toFixed(2) ?? '–'}</td></tr>`)}</tbody></table></div>
      <p>${X.verdict(data)}</p></div>
    <div class="card">${['a', 'b'].map((side, i) => html`<h3>${T.experiments.side(i)}: ${data[side].name}</h3>
        <${ShadedChips} side=${data[side]} other=${data.same_tokens ? data[side === 'a' ? 'b' : 'a'] : null} label=${X.chips(data[side].name)}
          onPoint=${(place) => setPointed(place === null ? null : [side, place])} />`)}
      <p class="total" aria-live="polite">${pointed && data[pointed[0]].pieces[pointed[1]] ? X.token(data, ...pointed) : X.pointAt}</p>
      <${Tools} name="two-models" svg=${() => drawSides([data.a, data.b].map((side, i) => ({ ...side, heading: X.figureSide(i, side) })), MAX_BITS, X.figure)} data=${() => ({ a: listSide(data.a), b: listSide(data.b) })}
        rows=${() => [['model', 'place', 'id', 'token', 'surprise_bits', 'rank'], ...listTokens()]} python=${() => pythonReadings(traces())} /></div>
    ${data.next ? html`<${Duel} rows=${data.next.slice(0, N_ROWS)} names=${[data.a.name, data.b.name]} overlap=${data.overlap} data=${data} traces=${traces} />`
      : html`<div class="card"><h3>${T.experiments.nextTitle}</h3><p class="soft">${X.otherTokens}</p><div class="halves">${['a', 'b'].map((side) => html`<div><h4>${data[side].name}</h4>
          <ol>${data[side].next.map(([, label, p]) => html`<li>${label} <span class="number">${percent(p)}</span></li>`)}</ol></div>`)}</div>
        <${Tools} name="next-of-each" data=${() => ({ a: { ...nameSide(data.a), next: listNext(data.a) }, b: { ...nameSide(data.b), next: listNext(data.b) } })}
          rows=${() => [['model', 'id', 'token', 'probability'], ...['a', 'b'].flatMap((side) => data[side].next.map((row) => [data[side].name, ...row]))]}
          python=${() => pythonApart(traces(), N_NEXT)} /></div>`}`}
    ${!data && isReady && html`<p class="soft" role="status">${X.loading}</p>`}`;
}

const listNext = ({ next }) => next.map(([id, token, probability]) => ({ id, token, probability }));
const listSide = (side) => ({ ...nameSide(side), bits_per_byte: side.bits_per_byte, mean_bits: side.mean_bits,
  tokens: side.pieces.map(({ id, label }, i) => ({ place: i, id, token: label, surprise_bits: side.surprise_bits[i], rank: side.ranks[i] })) });

function ShadedChips({ side, other, label, onPoint }) {
  const dark = isDark();
  const look = (i) => {
    const surprise = side.surprise_bits[i];
    if (surprise === null) return { title: T.words.first };
    const than = other?.surprise_bits[i];
    return { style: shade(surprise / MAX_BITS, dark), title: `${bits(surprise)}, ${percent(2 ** -surprise)}${than === undefined || than === null ? '' : `, ${T.experiments.models.elsewhere(bits(than))}`}` };
  };
  return html`<${Chips} pieces=${side.pieces} selected=${null} look=${look} onPick=${onPoint} onPoint=${onPoint} label=${label} />`;
}

function TokensTab({ state, model: served, fail, attempt, tokens }) {
  const X = T.experiments.tokens;
  const model = state.m2 === 'compare' ? { compare: true } : state.m2?.startsWith('run ') ? { run: state.m2.slice(4) } : null;
  const answer = useAnswer(ask, '/lab/api/split', { text: tokens.text.slice(0, 10_000), model, attempt }, fail);
  if (!answer) return html`<p class="soft" role="status">${X.loading}</p>`;
  const { tokenizers, has_gpt2: hasGpt2 } = answer.data;
  const { text: split, model: other } = answer.body;
  const python = (i) => {
    if (i && i === tokenizers.length - 1 && hasGpt2) return 'from tinystories.data.gpt2_cache import load_cached_gpt2\n\ntokenizer = load_cached_gpt2()';
    const which = other?.compare ? { ...other, name: tokenizers[1].name } : { ...other, step: null };
    return i ? `import tinystories\n\n${pythonOther(which)}\ntokenizer = other.tokenizer` : `${pythonLoad(served)}\ntokenizer = storyteller.tokenizer`;
  };
  return html`${tokenizers.map((one, i) => html`<div class="card"><div class="row spread"><h3>${one.name}</h3>
      <span>${X.count(one)}</span></div>
      <p class="split-text" role="list" aria-label=${X.chips(one.name)}>${one.pieces.map((piece) => {
        const { text, kind } = readLabel(piece.label);
        return html`<span role="listitem" class=${`piece ${kind}`} title=${X.piece(piece)}>${kind === 'spaced' && text !== '␣' ? html`<i aria-hidden="true">·</i>` : ''}${text}</span>${text.includes('↵') && html`<span class="break"></span>`}`;
      })}</p>
      <${Tools} name=${`tokens-${i + 1}`} svg=${() => drawPieces(one.pieces, `${one.name}: ${X.count(one)}`)} data=${() => ({ tokenizer: one.name, text: split, vocab_size: one.vocab_size, n_tokens: one.n_tokens, n_bytes: one.n_bytes, tokens: one.pieces })}
        rows=${() => [['place', 'id', 'token'], ...one.pieces.map(({ id, label }, place) => [place, id, label])]} python=${() => pythonPieces(python(i), split)} /></div>`)}
    ${!hasGpt2 && html`<p class="card soft">${X.noGpt2}</p>`}
    <div class="card"><div class="scroll" tabindex="0"><table class="facts-table"><thead><tr><th>${X.tokenizer}</th><th>${X.vocabulary}</th><th>${X.nTokens}</th><th>${X.bytesPerToken}</th></tr></thead><tbody>
      ${tokenizers.map((one) => html`<tr><th scope="row">${one.name}</th><td>${one.vocab_size}</td><td>${one.n_tokens}</td><td>${one.n_tokens ? (one.n_bytes / one.n_tokens).toFixed(2) : '–'}</td></tr>`)}</tbody></table></div></div>`;
}
