// The figures about one text as SVG files.
import { drawBytes, scale, shade } from './colors.js';
import { ACCENT, box, chip, drawSurprise, escape, LINE, make, MARGIN, round, SHADE, sheet, SOFT, text, WIDTH, wrap } from './paper.js';
import { percent } from './tokens.js';
import { isOnPath, linkBetween } from './tree.js';

const MODEL = '#c07c17';
const MAX_LABELED = 40; // tokens up to which a matrix has labels

// Words: `bits` of each token, null for the first.
export function drawWords(pieces, bits, maxBits, title) {
  const [parts, height] = drawSurprise(pieces, bits, maxBits, 50);
  return sheet(WIDTH, height + 8, title, parts);
}

// Next word: candidates {label, model, final, cut (a text, or null)}, also the rest.
export function drawBars(candidates, title, legend) {
  const [left, length] = [130, 470];
  const longest = Math.max(0.01, ...candidates.flatMap(({ model, final }) => [model, final]));
  const parts = candidates.map(({ label, model, final, cut }, i) => {
    const y = 46 + 26 * i;
    return [text(left - 8, y + 14, label, { text_anchor: 'end' }), box(left, y, length, 18, { fill: SHADE }),
      box(left, y, (length * Math.max(0, final)) / longest, 18, { fill: ACCENT }), box(left, y + 13, (length * Math.max(0, model)) / longest, 5, { fill: MODEL }),
      text(left + length + 10, y + 14, `${percent(model)} → ${cut ?? percent(final)}`, { fill: SOFT })];
  });
  const bottom = 46 + 26 * candidates.length;
  return sheet(WIDTH, bottom + 34, title, [parts, text(MARGIN, bottom + 18, legend, { font_size: 12, fill: SOFT })]);
}

// The tree of paths: the places of `layOut`.
export function drawTree(places, current, title) {
  const [width, height, top] = [116, 34, 44];
  const nodes = places.map((place) => {
    const stroke = isOnPath(place.ids, current) ? ACCENT : LINE;
    const link = place.parent ? make('path', { d: linkBetween(place.parent, place, [width, height]), fill: 'none', stroke }) : '';
    const [x, y] = [place.column * width, place.row * height];
    return [link, box(x, y + 2, width - 14, height - 8, { rx: 5, fill: '#ffffff', stroke }),
      text(x + 6, y + 19, place.node.label), text(x + width - 18, y + 18, percent(place.node.p), { font_size: 10, fill: SOFT, text_anchor: 'end' })];
  });
  const columns = 1 + Math.max(...places.map((place) => place.column));
  const rows = 1 + Math.max(...places.map((place) => place.row));
  return sheet(Math.max(420, columns * width + 2 * MARGIN), top + rows * height + MARGIN, title, make('g', { transform: `translate(${MARGIN} ${top})` }, nodes));
}

// Attention of one word: `row` has a share for each token, `read` lists [share, token] of the arcs.
export function drawReading(pieces, row, query, read, title) {
  const [places, height] = wrap(pieces, 84, 56);
  const chips = places.map((place, i) => (i === query ? chip(place, {}, { stroke: ACCENT, stroke_width: 2 }) : chip(place, i < query ? shade(Math.sqrt(row[i]), false) : { color: SOFT })));
  const arcs = read.filter(([, i]) => i !== query).map(([share, i]) => {
    const [[x1, y1], [x2, y2]] = [places[query], places[i]].map(({ x, y, width }) => [round(x + width / 2), y]);
    const lift = Math.min(y1, y2) - Math.min(34, 8 + Math.abs(x1 - x2) / 8);
    return make('path', { d: `M${x1} ${y1} C${x1} ${lift} ${x2} ${lift} ${x2} ${y2}`, fill: 'none', stroke: ACCENT, stroke_width: round(0.75 + 4 * Math.sqrt(share)), opacity: 0.6 });
  });
  const line = read.map(([share, i]) => `${pieces[i].label} ${percent(share)}`).join(', ');
  return sheet(WIDTH, height + 16, title, [text(MARGIN, 48, line, { font_size: 12, fill: SOFT }), chips, arcs]);
}

const picture = (x, y, size, matrices, index) => {
  const canvas = document.createElement('canvas');
  drawBytes(canvas, (row, column) => matrices.at(index, row, column), matrices.size, false);
  return make('image', { x, y, width: size, height: size, href: canvas.toDataURL(), image_rendering: 'pixelated' });
};

// All heads: thumbnails, a row for each layer.
export function drawHeads(matrices, nLayer, nHead, title) {
  const [cell, left, top] = [nHead > 8 ? 60 : 84, 46, 64];
  const parts = [];
  for (let layer = 0; layer < nLayer; layer++) {
    parts.push(text(left - 8, top + cell * (layer + 0.5), layer, { text_anchor: 'end', fill: SOFT }));
    for (let head = 0; head < nHead; head++) {
      if (layer === 0) parts.push(text(left + cell * (head + 0.5), top - 8, head, { text_anchor: 'middle', fill: SOFT }));
      parts.push(picture(left + cell * head, top + cell * layer, cell - 6, matrices, layer * nHead + head));
    }
  }
  return sheet(Math.max(420, left + cell * nHead + MARGIN), top + cell * nLayer + MARGIN, title, parts);
}

// One head: `matrix` of bytes, with labels if the text is short.
export function drawMatrix(pieces, matrix, title) {
  const n = pieces.length;
  if (n > MAX_LABELED) return sheet(560 + 2 * MARGIN, 560 + 44 + MARGIN, title, picture(MARGIN, 44, 560, matrix, 0));
  const [side, left, top] = [Math.max(15, Math.floor(480 / n)), 120, 150];
  const size = Math.min(13, side - 2);
  const parts = pieces.map(({ label }, i) => [
    text(left - 6, top + side * (i + 0.5) + 4, label, { font_size: size, text_anchor: 'end' }),
    make('text', { transform: `translate(${round(left + side * (i + 0.5) + 4)} ${top - 6}) rotate(-90)`, font_size: size }, escape(label)),
    Array.from({ length: i + 1 }, (_, column) => box(left + side * column, top + side * i, side, side, { fill: `rgb(${scale(matrix.at(0, i, column) / 255, false).join(' ')})` })),
  ]);
  return sheet(Math.max(420, left + side * n + MARGIN), top + side * n + MARGIN, title, parts);
}

// The logit lens: `cells[stage][column]` is {label, p, isFinal}.
export function drawLens(stages, columns, cells, title) {
  const [left, top, width, height] = [96, 74, 84, 32];
  const parts = columns.map((label, c) => text(left + width * (c + 0.5), top - 10, label, { text_anchor: 'middle', font_size: 12, fill: SOFT }));
  stages.forEach((stage, s) => {
    parts.push(text(left - 8, top + height * s + 20, stage, { text_anchor: 'end', font_size: 12, fill: SOFT }));
    cells[s].forEach(({ label, p, isFinal }, c) => {
      const { background, color } = shade(p, false);
      parts.push(box(left + width * c, top + height * s, width - 2, height - 2, { fill: background, rx: 3 }));
      parts.push(text(left + width * (c + 0.5), top + height * s + 14, `${label}${isFinal ? ' •' : ''}`, { text_anchor: 'middle', font_size: 12, fill: color }));
      parts.push(text(left + width * (c + 0.5), top + height * s + 26, percent(p), { text_anchor: 'middle', font_size: 9, fill: color }));
    });
  });
  return sheet(Math.max(420, left + width * columns.length + MARGIN), top + height * stages.length + MARGIN, title, parts);
}

// The rank of the final answer by stage, on a logarithmic axis.
export function drawRanks(ranks, stages, title) {
  const [width, height, left, top] = [560, 300, 76, 50];
  const most = Math.max(10, ...ranks);
  const x = (i) => left + 20 + (i * (width - left - 60)) / Math.max(1, ranks.length - 1);
  const y = (rank) => top + 10 + (Math.log(rank) / Math.log(most)) * (height - top - 60);
  const ticks = [1, 10, 100, 1000, 10000, 100000].filter((rank) => rank <= most);
  return sheet(width, height, title, [
    ticks.map((rank) => make('line', { x1: left, x2: width - MARGIN, y1: round(y(rank)), y2: round(y(rank)), stroke: LINE }) + text(left - 8, y(rank) + 4, rank, { text_anchor: 'end', font_size: 12, fill: SOFT })),
    make('path', { d: ranks.map((rank, i) => `${i ? 'L' : 'M'}${round(x(i))} ${round(y(rank))}`).join(''), fill: 'none', stroke: ACCENT, stroke_width: 2 }),
    ranks.map((rank, i) => make('circle', { cx: round(x(i)), cy: round(y(rank)), r: 4, fill: ACCENT }) + text(x(i), height - 20, stages[i].replace('embedding', 'emb.').replace('layer ', ''), { text_anchor: 'middle', font_size: 12, fill: SOFT })),
  ]);
}
