// Attention: where does it look? Thumbnails of all heads, one of them large, and words that a word reads.
import { ask, askBytes } from './api.js';
import { useAnswer } from './answers.js';
import { drawBytes, isDark, shade } from './colors.js';
import { drawHeads, drawMatrix, drawReading } from './drawing.js';
import { Tools } from './figures.js';
import { readAppended } from './next.js';
import { pythonAblation, pythonHead, pythonHeads, pythonTrace } from './python.js';
import { LAB as T } from './texts.js';
import { bits, Chips, percent } from './tokens.js';
import { html, moveInGroup, useEffect, useLayoutEffect, useRef, useState, WRITING } from './ui.js';

const N_READ = 5; // words listed, and arcs drawn
const MAX_LABELED = 40; // tokens up to which the matrix has labels

// Matrices of the server: {size, at(matrix, row, column)}, bytes of round(255 * sqrt(p)).
export async function askMatrices(path, body) {
  const buffer = await askBytes(path, body);
  const [kind, , size] = new Uint32Array(buffer.slice(0, 12));
  const bytes = new Uint8Array(buffer, 12);
  if (kind === 2) return { size, at: (m, row, column) => bytes[(m * size + row) * size + column] };
  const triangle = (size * (size + 1)) / 2;
  return { size, at: (m, row, column) => (column > row ? 0 : bytes[m * triangle + (row * (row + 1)) / 2 + column]) };
}

const probability = (byte) => (byte / 255) ** 2;
const inRange = (value, n, otherwise) => (/^\d+$/.test(value ?? '') && Number(value) < n ? Number(value) : otherwise);

export function AttentionPane({ tokens, state, go, model, fail, attempt, isThere }) {
  const [pointed, setPointed] = useState(null);
  const { ids, pieces } = tokens;
  const A = T.attention;
  const layer = inRange(state.l, model.n_layer, Math.floor(model.n_layer / 2));
  const head = inRange(state.h, model.n_head, 0);
  const off = (state.off ?? '').split('_').map((pair) => pair.split('.').map(Number)).filter(([l, h]) => l < model.n_layer && h < model.n_head);
  const isOff = (l, h) => off.some(([a, b]) => a === l && b === h);
  const fits = (answer) => (answer && answer.body.ids.join() === ids.join() ? answer.data : null);
  const grid = useAnswer(askMatrices, '/lab/api/attention', { ids, attempt }, fail);
  const thumbnails = grid?.data;
  const asked = useAnswer(askMatrices, '/lab/api/attention', { ids, layer, head, attempt }, fail);
  const matrix = asked?.data.size === ids.length ? asked.data : null;
  const isCurrent = fits(asked) !== null && asked.body.layer === layer && asked.body.head === head; // else the matrix is still of the past
  const summary = fits(useAnswer(ask, '/lab/api/heads', { ids, attempt }, fail));
  const ablation = fits(useAnswer(ask, '/lab/api/ablate', off.length ? { ids, heads: off, attempt } : null, fail));
  const dark = isDark();
  const query = pointed !== null && pointed < pieces.length ? pointed : inRange(state.q, pieces.length, pieces.length - 1);
  const row = matrix ? pieces.map((_, i) => (i <= query ? matrix.at(0, query, i) : 0)) : [];
  const read = row.map((byte, i) => [byte, i]).filter(([byte]) => byte > 12).sort((a, b) => b[0] - a[0]).slice(0, N_READ);

  const state2 = useRef(null);
  state2.current = { layer, head };
  useEffect(() => {
    const onKey = (event) => {
      if (event.target.matches(WRITING) || event.ctrlKey || event.metaKey || event.altKey) return;
      const { layer, head } = state2.current;
      const step = { '[': [-1, 0], ']': [1, 0], ',': [0, -1], '.': [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const l = (layer + step[0] + model.n_layer) % model.n_layer;
      const h = (head + step[1] + model.n_head) % model.n_head;
      go({ l, h }, { replace: true });
    };
    addEventListener('keydown', onKey);
    return () => removeEventListener('keydown', onKey);
  }, []);

  function toggle() {
    const rest = off.filter(([l, h]) => l !== layer || h !== head);
    go({ off: (isOff(layer, head) ? rest : [...off, [layer, head]]).map((pair) => pair.join('.')).join('_') });
  }

  function look(i) {
    if (i === query) return { className: 'query', style: { outline: '2px solid var(--accent)' }, title: A.reads };
    if (i > query || !row.length) return { title: A.later, style: { opacity: 0.45 } };
    return { style: shade(row[i] / 255, dark), title: percent(probability(row[i])) };
  }

  const trace = () => pythonTrace(model, tokens, readAppended(state));
  const shares = () => pieces.map((_, i) => pieces.slice(0, i + 1).map((_, j) => probability(matrix.at(0, i, j))));
  const listHeads = () => summary.previous.flatMap((row, l) => row.map((_, h) => ({
    layer: l, head: h, first: summary.first[l][h], self: summary.self[l][h], previous: summary.previous[l][h], same: summary.same[l][h],
  })));
  const tags = summary?.previous.length > 0 && ['previous', 'first', 'self', 'same'].map((name) => [name, summary[name][layer][head]]).filter(([, p]) => p >= 0.1);
  const cost = ablation && ablation.ablated_mean_bits - ablation.mean_bits;
  return html`<section class="pane" aria-label=${A.name}>
    <h2>${A.question}</h2><p>${A.explanation}</p>
    <div class="card">
      <h3>${A.head(layer, head)}</h3>
      ${tags && html`<div class="tags">${tags.length ? tags.map(([name, p]) => html`<span>${A.tags[name]} ${percent(p)}</span>`) : html`<span>${A.wide}</span>`}</div>`}
      <div class="arcbox"><${Chips} pieces=${pieces} selected=${query} look=${look} onPick=${(i) => isThere(i) && go({ q: i })} onPoint=${setPointed} label=${A.chips}>
        <${Arcs} query=${query} read=${read} /></${Chips}></div>
      <p role="status">${A.readsLine(pieces[query].label)} ${read.length ? read.map(([byte, i]) => `${pieces[i].label} ${percent(probability(byte))}`).join(', ') : '…'}</p>
      ${matrix && html`<${Tools} name=${`attention-of-word-${query}`} isReady=${isCurrent} svg=${() => drawReading(pieces, row.map(probability), query, read.map(([byte, i]) => [probability(byte), i]), `${A.head(layer, head)}: ${A.readsLine(pieces[query].label)}`)}
        data=${() => ({ layer, head, token: query, tokens: pieces.map(({ label }) => label), attention: row.map(probability) })}
        rows=${() => [['place', 'token', 'attention'], ...pieces.slice(0, query + 1).map(({ label }, i) => [i, label, probability(row[i])])]}
        python=${() => `${pythonHead(trace(), layer, head)}\nprint(attention[${query}])`} />`}
    </div>
    <div class="split">
      <div class="card"><h3>${A.all}</h3>
        <div class="thumbs" role="group" aria-label=${A.all} style=${{ gridTemplateColumns: `auto repeat(${model.n_head}, auto)` }} onKeyDown=${moveInGroup}>
          <span></span>${Array.from({ length: model.n_head }, (_, h) => html`<span>${h}</span>`)}
          ${Array.from({ length: model.n_layer }, (_, l) => html`<span>${l}</span>${Array.from({ length: model.n_head }, (_, h) => html`
            <button type="button" data-item class=${isOff(l, h) ? 'off' : ''} tabindex=${l === layer && h === head ? 0 : -1} aria-pressed=${l === layer && h === head}
              aria-label=${A.head(l, h)} title=${A.head(l, h)} onClick=${() => go({ l, h })}>
              <${Matrix} matrices=${thumbnails} index=${l * model.n_head + h} dark=${dark} /></button>`)}`)}
        </div><p class="soft">${A.gridHint}</p>
        ${thumbnails && html`<${Tools} name="all-heads" isReady=${fits(grid) !== null} svg=${() => drawHeads(thumbnails, model.n_layer, model.n_head, A.all)}
          data=${summary?.previous.length > 0 && listHeads} rows=${summary?.previous.length > 0 && (() => [['layer', 'head', 'first', 'self', 'previous', 'same'], ...listHeads().map(Object.values)])}
          python=${() => pythonHeads(trace())} />`}</div>
      <aside class="card"><h3>${A.off}</h3><p class="soft">${A.offHint}</p>
        <button type="button" aria-pressed=${isOff(layer, head)} onClick=${toggle}>${isOff(layer, head) ? A.switchOn(layer, head) : A.switchOff(layer, head)}</button>
        ${off.length > 0 && html`<p>${A.offList(off)} <button type="button" onClick=${() => go({ off: '' })}>${A.allOn}</button></p>`}
        ${ablation && html`<dl class="facts"><dt>${A.before}</dt><dd>${bits(ablation.mean_bits)}</dd><dt>${A.after}</dt><dd>${bits(ablation.ablated_mean_bits)}</dd>
            <dt>${A.cost}</dt><dd><b>${cost >= 0 ? '+' : '−'}${bits(Math.abs(cost))}</b></dd></dl>
          <h3>${A.nextThen}</h3><ol>${ablation.ablated_top.slice(0, 4).map(([id, p], i) => html`<li>${ablation.labels[id]} ${percent(p)}
            <span class="soft"> (${A.was} ${ablation.labels[ablation.top[i][0]]} ${percent(ablation.top[i][1])})</span></li>`)}</ol>
          <${Tools} name="heads-off" data=${() => ({ heads_off: off, ...ablation })} rows=${() => [['place', 'token', 'surprise_bits', 'surprise_bits_without'], ...pieces.map(({ label }, i) => [i, label, ablation.surprise_bits[i], ablation.ablated_surprise_bits[i]])]}
            python=${() => pythonAblation(trace(), off)} />`}
      </aside>
    </div>
    <div class="card matrix"><h3>${A.matrix(layer, head)}</h3><p class="soft">${A.matrixHint}</p>
      ${matrix && html`<${LargeMatrix} matrix=${matrix} pieces=${pieces} dark=${dark} onPick=${(i) => isThere(i) && go({ q: i })} />
        <${Tools} name=${`attention-${layer}-${head}`} isReady=${isCurrent} svg=${() => drawMatrix(pieces, matrix, A.matrix(layer, head))} data=${() => ({ layer, head, tokens: pieces.map(({ label }) => label), attention: shares() })}
          rows=${() => [['', ...pieces.map(({ label }) => label)], ...shares().map((row, i) => [pieces[i].label, ...pieces.map((_, j) => row[j] ?? '')])]} python=${() => pythonHead(trace(), layer, head)} />`}</div>
    ${row.length > 0 && html`<details><summary>${A.asTable}</summary><div class="scroll"><table><thead><tr><th>${A.word}</th><th>${A.share}</th></tr></thead><tbody>
      ${pieces.map((piece, i) => i <= query && html`<tr><td>${piece.label}</td><td>${percent(probability(row[i]))}</td></tr>`)}</tbody></table></div></details>`}
  </section>`;
}

function Matrix({ matrices, index, dark }) {
  const canvas = useRef(null);
  useEffect(() => {
    if (matrices) drawBytes(canvas.current, (row, column) => matrices.at(index, row, column), matrices.size, dark);
  }, [matrices, index, dark]);
  return html`<canvas ref=${canvas} width="1" height="1" aria-hidden="true"></canvas>`;
}

// Arcs from a word to those it reads most, drawn over the chips.
function Arcs({ query, read }) {
  const svg = useRef(null);
  const [paths, setPaths] = useState([]);
  useLayoutEffect(() => {
    const place = () => {
      const chips = svg.current.parentElement.querySelectorAll('[data-index]');
      const middle = (i) => [chips[i].offsetLeft + chips[i].offsetWidth / 2, chips[i].offsetTop];
      setPaths(read.filter(([, i]) => i !== query && chips[i]).map(([byte, i]) => {
        const [[x1, y1], [x2, y2]] = [middle(query), middle(i)];
        const lift = Math.min(y1, y2) - Math.min(34, 8 + Math.abs(x1 - x2) / 8);
        return { d: `M${x1} ${y1} C${x1} ${lift} ${x2} ${lift} ${x2} ${y2}`, width: 0.75 + (4 * byte) / 255 };
      }));
    };
    place();
    addEventListener('resize', place);
    return () => removeEventListener('resize', place);
  }, [query, read.join()]);
  return html`<svg class="arcs" ref=${svg} aria-hidden="true">${paths.map(({ d, width }) => html`<path d=${d} stroke-width=${width} />`)}</svg>`;
}

// The matrix of one head: rows read, columns are read. Short texts have labels.
function LargeMatrix({ matrix, pieces, dark, onPick }) {
  const canvas = useRef(null);
  const [cell, setCell] = useState(null);
  const n = pieces.length;
  const side = n <= MAX_LABELED ? Math.max(12, Math.floor(420 / n)) : Math.max(1, Math.floor(560 / n));
  const margin = n <= MAX_LABELED ? 84 : 0;
  useEffect(() => {
    const small = document.createElement('canvas');
    drawBytes(small, (row, column) => matrix.at(0, row, column), n, dark);
    const ratio = margin ? 2 : 1; // sharp letters
    canvas.current.width = canvas.current.height = ratio * (margin + n * side);
    const context = canvas.current.getContext('2d');
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, margin, margin, n * side, n * side);
    if (!margin) return;
    const style = getComputedStyle(canvas.current);
    context.font = `${Math.min(13, side)}px ${style.fontFamily}`;
    context.fillStyle = style.color;
    context.textBaseline = 'middle';
    pieces.forEach(({ label }, i) => {
      context.textAlign = 'right';
      context.fillText(label, margin - 5, margin + (i + 0.5) * side, margin - 8);
      context.save();
      context.translate(margin + (i + 0.5) * side, margin - 5);
      context.rotate(-Math.PI / 2);
      context.textAlign = 'left';
      context.fillText(label, 0, 0, margin - 8);
      context.restore();
    });
  }, [matrix, pieces, dark]);
  const find = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const unit = (margin + n * side) / box.width;
    const [column, row] = [event.clientX - box.left, event.clientY - box.top].map((x) => Math.floor((x * unit - margin) / side));
    return row >= 0 && row < n && column >= 0 && column <= row ? [row, column] : null;
  };
  return html`<canvas ref=${canvas} role="img" aria-label=${T.attention.matrixLabel} onMouseMove=${(event) => setCell(find(event))}
      onMouseLeave=${() => setCell(null)} onClick=${(event) => find(event) && onPick(find(event)[0])}></canvas>
    <p class="soft">${cell ? T.attention.cell(pieces[cell[0]].label, pieces[cell[1]].label, percent(probability(matrix.at(0, ...cell)))) : '\u00a0'}</p>`;
}
