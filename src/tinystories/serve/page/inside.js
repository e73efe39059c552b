// Inside: when does it know? The logit lens: what each layer would say next.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { isDark, shade } from './colors.js';
import { drawLens, drawRanks } from './drawing.js';
import { Tools } from './figures.js';
import { readAppended } from './next.js';
import { pythonLens, pythonTrace } from './python.js';
import { LAB as T } from './texts.js';
import { percent } from './tokens.js';
import { html, useLayoutEffect, useRef, useState } from './ui.js';

const COLUMNS = { wide: 24, narrow: 8 };

export function InsidePane({ tokens, state, go, model, fail, attempt }) {
  const [pointed, setPointed] = useState(null); // [stage, column]
  const [isNarrow] = useState(() => matchMedia('(max-width: 640px)').matches);
  const I = T.inside;
  const n = tokens.ids.length;
  const width = isNarrow ? COLUMNS.narrow : COLUMNS.wide;
  const wanted = /^\d+$/.test(state.to ?? '') ? Math.min(n, Math.max(1, Number(state.to))) : n;
  const start = Math.max(0, wanted - width);
  const answer = useAnswer(ask, '/lab/api/lens', { ids: tokens.ids, start, stop: wanted, top: 5, attempt }, fail);
  const lens = answer && answer.body.ids.join() === tokens.ids.join() && answer.body.start === start && answer.body.stop === wanted ? answer.data : null;
  const dark = isDark();
  const nStages = model.n_layer + 1;
  const chosen = /^\d+\.\d+$/.test(state.cell ?? '') ? state.cell.split('.').map(Number) : null;
  const inTable = ([s, position]) => s < nStages && position >= start && position < wanted;
  const [stage, position] = pointed && inTable(pointed) ? pointed : (chosen && inTable(chosen) ? chosen : [nStages - 1, wanted - 1]);
  const column = position - start;

  const trace = () => pythonTrace(model, tokens, readAppended(state));
  const cells = () => lens.top.map((row) => row.map(([[id, p]], c) => ({ label: lens.labels[id], p, isFinal: id === lens.final_ids[c] })));
  const labelsOf = (positions) => positions.map((i) => tokens.pieces[i].label);
  const listCells = () => lens.stages.flatMap((name, s) => lens.positions.map((i, c) => [
    name, i, tokens.pieces[i].label, lens.labels[lens.top[s][c][0][0]], lens.top[s][c][0][1], lens.final_ranks[s][c], lens.kl_bits[s][c],
  ]));
  const table = useRef(null);
  useLayoutEffect(() => {
    if (table.current) table.current.scrollLeft = table.current.scrollWidth; // the end of the text is what matters
  }, [lens]);

  function move(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const here = event.target.dataset.cell?.split('.').map(Number);
    if (!step || !here) return;
    const there = event.currentTarget.querySelector(`[data-cell="${here[0] + step[0]}.${here[1] + step[1]}"]`);
    event.preventDefault();
    there?.focus();
  }

  return html`<section class="pane" aria-label=${I.name}>
    <h2>${I.question}</h2><p>${I.explanation}</p><p class="soft">${I.caveat}</p>
    <div class="card"><div class="row"><button type="button" disabled=${start === 0} onClick=${() => go({ to: Math.max(width, wanted - width) }, { replace: true })}>${I.earlier}</button>
        <button type="button" disabled=${wanted === n} onClick=${() => go({ to: wanted + width >= n ? '' : wanted + width }, { replace: true })}>${I.later}</button>
        <span class="soft">${I.range(start, wanted, n)}</span></div>
      ${lens && html`<div class="scroll" ref=${table}><table class="lens" onKeyDown=${move} onMouseLeave=${() => setPointed(null)}>
        <thead><tr><th>${I.after}</th>${lens.positions.map((i) => html`<th scope="col">${tokens.pieces[i].label}</th>`)}</tr></thead>
        <tbody>${lens.stages.map((name, s) => html`<tr><th scope="row">${I.stage(name)}</th>${lens.positions.map((i, c) => {
          const [id, p] = lens.top[s][c][0];
          const isFinal = id === lens.final_ids[c];
          const isHere = s === stage && i === position;
          return html`<td><button type="button" data-cell=${`${s}.${i}`} tabindex=${isHere ? 0 : -1} aria-pressed=${isHere} style=${shade(p, dark)}
            title=${`${lens.labels[id]} ${percent(p)}`} aria-label=${I.cell(lens.labels[id], percent(p), isFinal)}
            onFocus=${() => setPointed([s, i])} onMouseEnter=${() => setPointed([s, i])} onClick=${() => go({ cell: `${s}.${i}` }, { replace: true })}>
            ${lens.labels[id]}${isFinal && ' •'}</button></td>`;
        })}</tr>`)}</tbody></table></div>`}
      <p class="soft">${I.legend}</p>
      ${lens && html`<${Tools} name="logit-lens" svg=${() => drawLens(lens.stages, labelsOf(lens.positions), cells(), I.figure)} data=${() => ({ ...lens, tokens: labelsOf(lens.positions) })}
        rows=${() => [['stage', 'place', 'after', 'best', 'probability', 'final_rank', 'kl_bits'], ...listCells()]} python=${() => pythonLens(trace(), start, wanted)} />`}</div>
    ${lens && lens.top[stage]?.[column] && html`<div class="split">
      <div class="card"><h3>${I.chartTitle(lens.labels[lens.final_ids[column]], tokens.pieces[position].label)}</h3>
        <${RankChart} ranks=${lens.final_ranks.map((row) => row[column])} stages=${lens.stages} />
        <${Tools} name="rank-by-layer" svg=${() => drawRanks(lens.final_ranks.map((row) => row[column]), lens.stages, I.chartTitle(lens.labels[lens.final_ids[column]], tokens.pieces[position].label))}
          data=${() => ({ after: tokens.pieces[position].label, final: lens.labels[lens.final_ids[column]], stages: lens.stages, ranks: lens.final_ranks.map((row) => row[column]) })}
          rows=${() => [['stage', 'rank'], ...lens.stages.map((name, s) => [name, lens.final_ranks[s][column]])]}
          python=${() => `${pythonLens(trace(), start, wanted)}\nprint(lens.final_ranks[:, ${column}])`} /></div>
      <aside class="card"><h3>${I.topTitle(I.stage(lens.stages[stage]), tokens.pieces[position].label)}</h3>
        <ol>${lens.top[stage][column].map(([id, p]) => html`<li>${lens.labels[id]} <span class="number">${percent(p)}</span></li>`)}</ol>
        <dl class="facts"><dt>${I.finalRank}</dt><dd>${lens.final_ranks[stage][column]}</dd>
          <dt>${I.finalProb}</dt><dd>${percent(lens.final_probs[stage][column])}</dd>
          <dt>${I.kl}</dt><dd>${lens.kl_bits[stage][column].toFixed(2)} bits</dd></dl></aside></div>`}
  </section>`;
}

// The rank of the final word at each stage, on a logarithmic axis: 1 is on top.
function RankChart({ ranks, stages }) {
  const [width, height, left, bottom] = [460, 200, 50, 26];
  const most = Math.max(10, ...ranks);
  const x = (i) => left + 14 + (i * (width - left - 34)) / Math.max(1, ranks.length - 1);
  const y = (rank) => 16 + (Math.log(rank) / Math.log(most)) * (height - bottom - 26);
  const ticks = [1, 10, 100, 1000, 10000, 100000].filter((rank) => rank <= most);
  return html`<svg class="chart" viewBox="0 0 ${width} ${height}" role="img" aria-label=${T.inside.chartLabel(ranks)}>
    ${ticks.map((rank) => html`<line x1=${left} x2=${width} y1=${y(rank)} y2=${y(rank)} /><text x=${left - 6} y=${y(rank) + 4} text-anchor="end">${rank}</text>`)}
    <path d=${ranks.map((rank, i) => `${i ? 'L' : 'M'}${x(i)} ${y(rank)}`).join('')} />
    ${ranks.map((rank, i) => html`<circle cx=${x(i)} cy=${y(rank)} r="4"><title>${T.inside.stage(stages[i])}: ${rank}</title></circle>
      <text x=${x(i)} y=${height - 8} text-anchor="middle">${i ? i - 1 : T.inside.embeddingShort}</text>`)}</svg>`;
}
