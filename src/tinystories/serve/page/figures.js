// Below every figure: save it as SVG, PNG, JSON or CSV, or copy the Python that makes its numbers.
import { LAB as T } from './texts.js';
import { html, useState } from './ui.js';

const PNG_SCALE = 2;

// Each of `svg` (text of an SVG file), `data` (for JSON), `rows` (for CSV, titles first) and `python` is a function that is
// called when it is asked for; those that are missing have no button. `isReady` false: the figure is still of the past.
export function Tools({ name, svg, data, rows, python, isReady = true }) {
  const [notice, setNotice] = useState('');
  const [code, setCode] = useState(null);
  const F = T.figures;

  async function copy() {
    const lines = python();
    setCode(lines);
    try {
      await navigator.clipboard.writeText(`${lines}\n`);
      setNotice(F.copied);
    } catch {
      setNotice(F.copyFailed);
    }
  }

  const save = (blob, ending) => {
    download(blob, `${name}.${ending}`);
    setNotice(F.saved(`${name}.${ending}`));
  };
  const text = (content, type) => new Blob([content], { type });
  return html`<div class="tools" data-figure=${name}><div class="row" role="group" aria-label=${F.label}>
    ${svg && html`<button type="button" disabled=${!isReady} onClick=${() => save(text(svg(), 'image/svg+xml'), 'svg')}>SVG</button>
      <button type="button" disabled=${!isReady} onClick=${async () => save(await toPng(svg()), 'png')}>PNG</button>`}
    ${data && html`<button type="button" disabled=${!isReady} onClick=${() => save(text(JSON.stringify(data(), null, 1), 'application/json'), 'json')}>JSON</button>`}
    ${rows && html`<button type="button" disabled=${!isReady} onClick=${() => save(text(toCsv(rows()), 'text/csv'), 'csv')}>CSV</button>`}
    ${python && html`<button type="button" disabled=${!isReady} onClick=${copy}>${F.python}</button>`}
    <span role="status">${notice}</span></div>
    ${code !== null && code === python() && html`<pre tabindex="0" aria-label=${F.code}>${code}</pre>`}</div>`;
}

function download(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function toPng(svg) {
  const image = new Image();
  image.src = URL.createObjectURL(new Blob([svg], { type: 'image/svg+xml' }));
  try {
    await image.decode();
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [PNG_SCALE * image.width, PNG_SCALE * image.height];
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

function toCsv(rows) {
  const cell = (value) => (/[",\n\r]/.test(String(value ?? '')) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ''));
  return `${rows.map((row) => row.map(cell).join(',')).join('\r\n')}\r\n`;
}
