// The curves of runs, and what they said, as SVG files.
import { axisText } from './curves.js';
import { clip, LINE, make, MARGIN, measure, round, sheet, SOFT, text, WIDTH } from './paper.js';

const SMALL = { font_size: 12, fill: SOFT };

// Round numbers from `low` to `high`, about `n` of them.
function findTicks(low, high, n) {
  const power = 10 ** Math.floor(Math.log10((high - low) / n));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size * n >= high - low);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

// From values to places between two ends, and the ticks.
function makeScale(values, [from, to], n) {
  let [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  return { place: (value) => from + ((value - low) / (high - low)) * (to - from), ticks: findTicks(low, high, n) };
}

// A line, broken where a value is missing.
function trace(points, x, y) {
  let command = 'M';
  return points.map(([a, b]) => {
    if (b === null) {
      command = 'M';
      return '';
    }
    const part = `${command}${Math.round(10 * x.place(a)) / 10} ${Math.round(10 * y.place(b)) / 10}`;
    command = 'L';
    return part;
  }).join('');
}

// One chart: `lines` as those of curves.js, with the left upper corner and the size of what is inside its axes.
function drawChart({ lines, xLabel, yLabel, title }, left, top, width, height) {
  const known = lines.flatMap(({ points }) => points.filter(([, value]) => value !== null));
  const [right, bottom] = [left + width, top + height];
  const frame = [title && text(left, top - 10, clip(title, width, 12), SMALL), make('path', { d: `M${left} ${top}V${bottom}H${right}`, fill: 'none', stroke: SOFT })];
  if (!known.length) return frame;
  const x = makeScale(known.map(([value]) => value), [left, right], Math.max(4, Math.floor(width / 90)));
  const y = makeScale(known.map(([, value]) => value), [bottom - 6, top + 6], Math.max(4, Math.floor(height / 45)));
  return [frame,
    y.ticks.map((value) => [make('line', { x1: left, x2: right, y1: round(y.place(value)), y2: round(y.place(value)), stroke: LINE }),
      text(left - 6, y.place(value) + 4, axisText(value), { ...SMALL, text_anchor: 'end' })]),
    x.ticks.map((value) => [make('line', { x1: round(x.place(value)), x2: round(x.place(value)), y1: bottom, y2: bottom + 4, stroke: SOFT }),
      text(x.place(value), bottom + 17, axisText(value), { ...SMALL, text_anchor: 'middle' })]),
    text((left + right) / 2, bottom + 34, xLabel, { ...SMALL, text_anchor: 'middle' }),
    yLabel && make('text', { ...SMALL, transform: `translate(${left - 50} ${(top + bottom) / 2}) rotate(-90)`, text_anchor: 'middle' }, yLabel),
    lines.map(({ points, color, dash, width: stroke, dots }) => [
      make('path', { d: trace(points, x, y), fill: 'none', stroke: color, stroke_width: stroke, stroke_dasharray: dash?.join(' '), stroke_linejoin: 'round' }),
      dots && points.filter(([, value]) => value !== null).map(([a, b]) => make('circle', { cx: round(x.place(a)), cy: round(y.place(b)), r: 3, fill: color }))])];
}

// `legend`: [{color, dash, training, validation}] for each run. `main` fills the width, `others` share the row below it.
export function drawCurves({ legend, main, others, title }) {
  const half = (WIDTH - 2 * MARGIN) / 2;
  const key = (x, y, { color, dash }, width, label, room) => [make('line', { x1: x, x2: x + 30, y1: y - 4, y2: y - 4, stroke: color, stroke_width: width, stroke_dasharray: dash?.join(' ') }),
    text(x + 38, y, clip(label, room, 13), { font_size: 13 })];
  const rows = legend.map((run, i) => [key(MARGIN, 52 + 20 * i, run, 1.5, run.training, half - 50), key(MARGIN + half, 52 + 20 * i, run, 2.5, run.validation, half - 50)]);
  const top = 52 + 20 * legend.length;
  const small = top + 300 + 90;
  return sheet(WIDTH, small + 130 + 50, title, [rows, drawChart(main, 80, top, WIDTH - 80 - MARGIN, 300),
    others.map((chart, i) => drawChart(chart, 70 + i * half, small, half - 54 - MARGIN, 130))]);
}

// Lines of a text that fit into a width.
function breakLines(content, width, size) {
  return content.split('\n').flatMap((paragraph) => {
    const lines = [''];
    for (const word of paragraph.split(/(?<=\s)/)) {
      if (lines.at(-1) && measure(lines.at(-1) + word.trimEnd(), size) > width) lines.push('');
      lines[lines.length - 1] += word;
    }
    return lines.map((line) => clip(line.trimEnd(), width, size));
  });
}

// What a run said: a block for each story.
export function drawSamples(stories, title) {
  let y = 56;
  const parts = stories.map((story) => {
    const top = y;
    const lines = breakLines(story, WIDTH - 2 * MARGIN - 20, 14).map((line, i) => text(MARGIN + 14, top + 20 * i, line));
    y += 20 * lines.length + 16;
    return [make('path', { d: `M${MARGIN + 2} ${top - 14}V${y - 30}`, stroke: LINE, stroke_width: 3 }), lines];
  });
  return sheet(WIDTH, y, title, parts);
}
