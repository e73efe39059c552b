// What Training and Experiments share: the list of runs, questions that are asked again, two sides and their colors.
import { ask } from './api.js';
import { html, useEffect, useState } from './ui.js';

const LIST_EVERY_MS = 5000;

// Blue and orange, which color-blind readers tell apart; the second run is dashed as well.
export const sideColors = (dark) => (dark ? ['#8fbbe8', '#f0b04f'] : ['#2f5d8a', '#985900']);
export const runPath = (name) => `/lab/api/runs/${encodeURIComponent(name)}`;

// What a GET of this path answers, asked again when `key` changes; null before.
export function useGet(path, key, fail) {
  const [answer, setAnswer] = useState({});
  useEffect(() => {
    let isLate = false;
    if (path) {
      ask(path).then((data) => { if (!isLate) { setAnswer({ path, data }); fail(null); } }, (error) => !isLate && fail(error));
    }
    return () => { isLate = true; };
  }, [path, key]);
  return answer.path === path ? answer.data : null;
}

export function useRunList(find, attempt, fail) {
  const [tick, setTick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => document.hidden || setTick((n) => n + 1), LIST_EVERY_MS);
    return () => clearInterval(timer);
  }, []);
  const [latest, setLatest] = useState(null);
  const answer = useGet(`/lab/api/runs${find ? `?find=${encodeURIComponent(find)}` : ''}`, `${tick} ${attempt}`, fail);
  useEffect(() => { if (answer) setLatest(answer); }, [answer]);
  return answer ?? latest; // the list stays while a search is on its way
}

// A group of which one is chosen, as radio buttons.
export function Segments({ label, name, options, value, onChange }) {
  return html`<fieldset class="choice"><legend>${label}</legend><div class="segments">${Object.entries(options).map(
    ([key, text]) => html`<label><input type="radio" name=${name} value=${key} checked=${key === value}
      onChange=${() => onChange(key)} /><span>${text}</span></label>`,
  )}</div></fieldset>`;
}
