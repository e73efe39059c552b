// Two sides of an experiment, and the cuts of a tokenizer, as SVG files.
import { box, chip, clip, drawSurprise, LINE, MARGIN, SHADE, sheet, SOFT, text, WIDTH, wrap } from './paper.js';
import { sideColors } from './runs.js';
import { percent } from './tokens.js';

// Next tokens: rows {label, a, b}, A above B; `names` of the sides, a line of text below, `difference(row)` in words.
export function drawDuel(rows, names, overlap, difference, title) {
  const [left, length, top] = [150, 440, 50 + 22 * names.length];
  const colors = sideColors(false);
  const longest = Math.max(0.01, ...rows.flatMap(({ a, b }) => [a, b]));
  const legend = names.map((name, i) => [box(MARGIN, 42 + 22 * i, 24, 10, { fill: colors[i] }), text(MARGIN + 34, 52 + 22 * i, clip(name, WIDTH - 90))]);
  const parts = rows.map(({ label, a, b }, i) => {
    const y = top + 30 * i;
    return [text(left - 10, y + 16, clip(label, left - 30), { text_anchor: 'end' }), box(left, y, length, 23, { fill: SHADE }),
      box(left, y, (length * a) / longest, 11, { fill: colors[0] }), box(left, y + 12, (length * b) / longest, 11, { fill: colors[1] }),
      text(left + length + 90, y + 16, percent(a), { fill: colors[0], text_anchor: 'end' }), text(left + length + 170, y + 16, percent(b), { fill: colors[1], text_anchor: 'end' }),
      text(left + length + 240, y + 16, difference(b - a), { fill: SOFT, text_anchor: 'end' })];
  });
  const bottom = top + 30 * rows.length;
  return sheet(WIDTH, bottom + 34, title, [legend, parts, text(MARGIN, bottom + 18, overlap, { font_size: 12, fill: SOFT })]);
}

// A text as two models read it: sides {heading, pieces, surprise_bits}.
export function drawSides(sides, maxBits, title) {
  let top = 66;
  const parts = sides.map(({ heading, pieces, surprise_bits: bits }) => {
    const [tokens, height] = drawSurprise(pieces, bits, maxBits, top);
    const part = [text(MARGIN, top - 12, clip(heading, WIDTH - 2 * MARGIN)), tokens];
    top = height + 34;
    return part;
  });
  return sheet(WIDTH, top - 24, title, parts);
}

// The pieces of a tokenizer.
export function drawPieces(pieces, title) {
  const [places, height] = wrap(pieces, 46, 30);
  return sheet(WIDTH, height + 8, title, places.map((place, i) => chip(place, { background: i % 2 ? SHADE : '#ffffff' }, { stroke: LINE })));
}
