// Words: what does the model see? Tokens, shaded by their surprise.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { isDark, scale, shade } from './colors.js';
import { drawWords } from './drawing.js';
import { Tools } from './figures.js';
import { readAppended } from './next.js';
import { pythonTrace, pythonWords } from './python.js';
import { LAB as T } from './texts.js';
import { bits, Chips, percent } from './tokens.js';
import { html, useEffect, useRef, useState } from './ui.js';

const MAX_BITS = 10; // from here on, the darkest shade
const RARE_RANK = 10;

export function WordsPane({ tokens, state, go, model, fail, attempt, isThere }) {
  const [pointed, setPointed] = useState(null);
  const answer = useAnswer(ask, '/lab/api/score', { ids: tokens.ids, attempt }, fail);
  const score = answer && answer.body.ids.join() === tokens.ids.join() ? answer.data : null;
  const W = T.words;
  const { pieces } = tokens;
  // The selected token is kept as the place of its text, so that it survives a change behind it.
  const at = /^\d+$/.test(state.c ?? '') ? pieces.findIndex((piece) => piece.start <= Number(state.c) && Number(state.c) < piece.end) : -1;
  // The offset of a word is that of its first letter; in the token, a space may precede it.
  const selected = at > 0 ? at : null;
  const shown = pointed !== null && pointed < pieces.length ? pointed : selected; // a shorter text may have come
  const dark = isDark();
  const select = (i) => isThere(i) && go({ c: pieces[i].end > pieces[i].start ? pieces[i].end - 1 : '' });
  const branch = (i, id) => isThere(i) && go({ t: tokens.text.slice(0, pieces[i].start), a: String(id), c: '' });

  function look(i) {
    const surprise = score?.surprise_bits[i];
    if (surprise === null || surprise === undefined) return { title: i ? '' : W.first };
    return {
      style: shade(surprise / MAX_BITS, dark),
      className: score.ranks[i] > RARE_RANK ? 'rare' : '',
      title: `${bits(surprise)}, ${percent(2 ** -surprise)}, ${W.rank(score.ranks[i])}`,
    };
  }

  const listTokens = () => pieces.map(({ id, label }, i) => ({ place: i, id, token: label, surprise_bits: score.surprise_bits[i], rank: score.ranks[i] }));
  const worst = score && score.surprise_bits.map((b, i) => [b ?? -1, i]).sort((a, b) => b[0] - a[0]).slice(0, 5).filter(([b]) => b > 0);
  return html`<section class="pane" aria-label=${W.name}>
    <h2>${W.question}</h2><p>${W.explanation}</p>
    <div class="card total"><span>${W.nTokens} <b>${pieces.length}</b></span>
      ${score?.bits_per_byte !== undefined && score?.bits_per_byte !== null && html`<span>${W.bitsPerByte} <b>${score.bits_per_byte.toFixed(3)}</b></span>
        <span>${W.meanBits} <b>${score.mean_bits.toFixed(2)}</b></span>`}</div>
    <div class="split">
      <div class="card"><${Chips} pieces=${pieces} selected=${selected} look=${look} onPick=${select} onPoint=${setPointed} label=${W.chips} />
        <br /><${Legend} dark=${dark} />
        ${score && html`<${Tools} name="words" svg=${() => drawWords(pieces, score.surprise_bits, MAX_BITS, W.figure(score))} data=${listTokens}
          rows=${() => [['place', 'id', 'token', 'surprise_bits', 'rank'], ...listTokens().map(Object.values)]}
          python=${() => pythonWords(pythonTrace(model, tokens, readAppended(state)))} />`}</div>
      <aside class="card">${shown > 0 && score
        ? html`<h3>${pieces[shown].label}</h3><dl class="facts">
            <dt>${W.id}</dt><dd>${pieces[shown].id}</dd>
            <dt>${W.surprise}</dt><dd>${bits(score.surprise_bits[shown])}</dd>
            <dt>${W.probability}</dt><dd>${percent(2 ** -score.surprise_bits[shown])}</dd>
            <dt>${W.rankName}</dt><dd>${score.ranks[shown]}</dd></dl>
          <h3>${W.instead}</h3><ul class="choices">${score.top[shown].map(
            ([id, p]) => html`<li><button type="button" aria-pressed=${id === pieces[shown].id} title=${W.branch}
              onClick=${() => branch(shown, id)}><span>${score.labels[id]}</span><span class="number">${percent(p)}</span></button></li>`,
          )}</ul>`
        : html`<p class="soft">${W.choose}</p>`}
        ${worst?.length > 0 && shown === null && html`<h3>${W.worst}</h3><ul class="choices">${worst.map(
          ([b, i]) => html`<li><button type="button" onClick=${() => select(i)}><span>${pieces[i].label}</span><span class="number">${bits(b)}</span></button></li>`,
        )}</ul>`}</aside>
    </div>
    ${score && html`<details><summary>${W.asTable}</summary><div class="scroll"><table><thead><tr>
      <th>${W.place}</th><th>${W.token}</th><th>${W.surprise}</th><th>${W.probability}</th><th>${W.rankName}</th></tr></thead><tbody>
      ${pieces.map((piece, i) => i > 0 && html`<tr><td>${i}</td><td>${piece.label}</td><td>${bits(score.surprise_bits[i])}</td>
        <td>${percent(2 ** -score.surprise_bits[i])}</td><td>${score.ranks[i]}</td></tr>`)}</tbody></table></div></details>`}
  </section>`;
}

function Legend({ dark }) {
  const canvas = useRef(null);
  useEffect(() => {
    canvas.current.width = 200;
    canvas.current.height = 1;
    const context = canvas.current.getContext('2d');
    for (let x = 0; x < 200; x++) {
      context.fillStyle = `rgb(${scale(x / 199, dark).join(' ')})`;
      context.fillRect(x, 0, 1, 1);
    }
  }, [dark]);
  return html`<div class="legend"><span>${T.words.legendLow}</span><canvas ref=${canvas} aria-hidden="true"></canvas><span>${T.words.legendHigh}</span></div>`;
}
