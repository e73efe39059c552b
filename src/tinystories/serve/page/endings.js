// Eight endings from here: the same beginning, eight different draws.
import { Failure, recordedEndings, tellMany } from './api.js';
import { Tools } from './figures.js';
import { isRecording } from './recording.js';
import { LAB as T } from './texts.js';
import { html, useEffect, useRef, useState } from './ui.js';

const N_ENDINGS = 8;
const MAX_TOKENS = 400;

// The first and the last words of a text.
function shorten(text) {
  const words = text.trim().split(/\s+/);
  return words.length <= 36 ? text.trim() : `${words.slice(0, 18).join(' ')} … ${words.slice(-14).join(' ')}`;
}

// `prompt`: a text or ids, which is about to change unless `isFresh`; `python(options)`: the lines that tell the same endings.
export function Endings({ prompt, isFresh, sampling, seed, isPlain, python, fail }) {
  const [endings, setEndings] = useState([]);
  const [isTelling, setTelling] = useState(false);
  const running = useRef(null);
  const E = T.endings;
  const question = JSON.stringify([prompt, sampling, seed]);
  const stop = () => {
    running.current?.abort();
    running.current = null;
    setTelling(false);
  };
  useEffect(() => {
    setEndings([]);
    return stop;
  }, [question]);

  async function start() {
    const abort = (running.current = new AbortController());
    setTelling(true);
    fail(null);
    try {
      if (isRecording) {
        const recorded = isPlain ? await recordedEndings() : [];
        if (!recorded.length) throw new Failure('recorded', '');
        setEndings(recorded);
        return;
      }
      const texts = Array(N_ENDINGS).fill('');
      setEndings([...texts]);
      const body = { prompt, n: N_ENDINGS, seed, max_tokens: MAX_TOKENS, ...sampling };
      for await (const [i, piece] of tellMany(body, abort.signal)) {
        texts[i] += piece;
        setEndings([...texts]);
      }
    } catch (error) {
      if (error.name !== 'AbortError') fail(error);
    } finally {
      abort.abort(); // frees the slots
      if (running.current === abort) stop();
    }
  }

  const firsts = new Map(); // how often each first word occurs
  for (const word of endings.map((text) => text.trim().split(/\s+/)[0]).filter(Boolean)) firsts.set(word, (firsts.get(word) ?? 0) + 1);
  return html`<div class="card telling"><h3>${E.title}</h3><p class="soft">${E.hint}</p>
    <div class="row">${isTelling
      ? html`<button key="stop" type="button" onClick=${stop}>${E.stop}</button>`
      : html`<button key="tell" type="button" disabled=${!isFresh} onClick=${start}>${E.tell}</button>`}
      ${firsts.size > 0 && html`<span class="soft">${E.firsts} ${[...firsts].sort((a, b) => b[1] - a[1]).map(([word, n]) => `${word} ${n}×`).join(', ')}</span>`}</div>
    ${endings.length > 0 && html`<ol class="endings">${endings.map((text) => html`<li>${isTelling ? shorten(text) : html`<details><summary>${shorten(text)}</summary>${text}</details>`}</li>`)}</ol>
      <${Tools} name="endings" data=${() => ({ prompt, sampling, seed, endings })} rows=${() => [['ending'], ...endings.map((text) => [text])]}
        python=${() => python({ ...sampling, seed, max_tokens: MAX_TOKENS, num: N_ENDINGS })} />`}</div>`;
}
