// The paper that figures are drawn on, as SVG: white, with its text as text. Nothing here needs the page.
import { shade } from './colors.js';
import { readLabel } from './tokens.js';

export const INK = '#2b2622';
export const SOFT = '#665d53';
export const LINE = '#ddd2bf';
export const ACCENT = '#2f5d8a';
export const SHADE = '#efe7d8';
const FONT = 'Georgia, "DejaVu Serif", serif';
export const MARGIN = 16;
export const WIDTH = 860;

// Characters that XML does not allow would spoil the file.
export const escape = (text) => String(text).replace(/[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]/g, '\ufffd').replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');

// An element as text; attribute names have _ for -.
export function make(name, attributes, ...children) {
  const list = Object.entries(attributes).filter(([, value]) => value !== undefined);
  return `<${name}${list.map(([key, value]) => ` ${key.replaceAll('_', '-')}="${escape(value)}"`).join('')}>${children.flat(Infinity).filter(Boolean).join('')}</${name}>`;
}

export const text = (x, y, content, attributes = {}) => make('text', { x: round(x), y: round(y), ...attributes }, escape(content));
export const box = (x, y, width, height, attributes) => make('rect', { x: round(x), y: round(y), width: round(width), height: round(height), ...attributes });
export const round = (x) => Math.round(x * 100) / 100;

export function sheet(width, height, title, parts) {
  const size = { width: Math.ceil(width), height: Math.ceil(height) };
  const attributes = { xmlns: 'http://www.w3.org/2000/svg', ...size, viewBox: `0 0 ${size.width} ${size.height}`, font_family: FONT, font_size: 14, fill: INK };
  return make('svg', attributes, make('title', {}, escape(title)), box(0, 0, size.width, size.height, { fill: '#ffffff' }),
    text(MARGIN, 26, clip(title, size.width - 2 * MARGIN, 16.5), { font_size: 15, font_weight: 'bold' }), parts);
}

let pen = null;
export function measure(content, size = 14) {
  pen ??= document.createElement('canvas').getContext('2d');
  pen.font = `${size}px ${FONT}`;
  return pen.measureText(content).width;
}

// A text that fits into a width, with … for what does not.
export function clip(content, width, size = 14) {
  const letters = [...String(content)];
  if (measure(content, size) <= width) return content;
  let [low, high] = [0, letters.length]; // so many letters fit, so many do not
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (measure(`${letters.slice(0, middle).join('')}…`, size) <= width) low = middle;
    else high = middle;
  }
  return `${letters.slice(0, low).join('')}…`;
}

// Where each token of a text is drawn: [{x, y, width, text}] and the height. `least`: width of the narrowest one.
export function wrap(pieces, top, lineHeight, least = 0) {
  let [x, y] = [MARGIN, top];
  const places = pieces.map(({ label }) => {
    const { text: content, kind } = readLabel(label);
    const width = Math.max(least, measure(content) + 8);
    if (kind === 'spaced') x += 5;
    if (x + width > WIDTH - MARGIN) [x, y] = [MARGIN, y + lineHeight];
    const place = { x, y, width, text: content };
    x += width + 1;
    if (content.includes('↵')) [x, y] = [MARGIN, y + lineHeight];
    return place;
  });
  return [places, y + lineHeight];
}

export function chip({ x, y, width, text: content }, { background, color } = {}, attributes = {}) {
  return box(x, y, width, 22, { rx: 4, fill: background ?? 'none', ...attributes }) + text(x + width / 2, y + 16, content, { fill: color ?? INK, text_anchor: 'middle' });
}

// A text with the surprise of each token below it (null: none): the elements, and the height.
export function drawSurprise(pieces, bits, maxBits, top) {
  const [places, height] = wrap(pieces, top, 44, 22); // a number has its place below the narrowest token
  return [places.map((place, i) => (bits[i] === null
    ? chip(place, {}, { stroke: LINE })
    : [chip(place, shade(bits[i] / maxBits, false)), text(place.x + place.width / 2, place.y + 34, bits[i].toFixed(1), { font_size: 9, fill: SOFT, text_anchor: 'middle' })])), height];
}
