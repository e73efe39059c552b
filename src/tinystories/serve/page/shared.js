// What the pages of the server and the page in one file (formats/html) have in common. It imports nothing.

// A short or medium story ends with the first sentence after this many words; a long one where the model ends it.
export const LENGTHS = { short: 60, medium: 130, long: Infinity };
const SENTENCE_END = /[.!?]["”’']*(?=\s)/g;

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
const countWords = (text) => text.trim().split(/\s+/).length;

// Where the first sentence after so many words ends; -1: not yet. It does not matter in which pieces the text has come.
// `nGiven`: the characters of the beginning, which is never cut, however long it is.
export function findEnd(text, nWords, nGiven = 0) {
  if (nWords === Infinity) return -1;
  for (const match of text.matchAll(SENTENCE_END)) {
    const end = match.index + match[0].length;
    if (end > nGiven && countWords(text.slice(0, end)) >= nWords) return end;
  }
  return -1;
}

// Settings in the order in which they are applied. `name` is theirs in the API, `key` in the fragment.
export const KNOBS = [
  { name: 'repetition_penalty', key: 'rp', min: 1, max: 2, step: 0.05 },
  { name: 'temperature', key: 'temp', min: 0, max: 2, step: 0.05 },
  { name: 'top_k', key: 'k', min: 0, max: 100, step: 1 },
  { name: 'top_p', key: 'tp', min: 0.05, max: 1, step: 0.05 },
  { name: 'min_p', key: 'mp', min: 0, max: 0.5, step: 0.01 },
];

export function percent(p) {
  if (p === null || p === undefined) return '';
  if (p < 1e-6) return '0 %';
  if (p < 0.0001) return '< 0.01 %';
  return p >= 0.9995 ? '100 %' : `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
}

// What the browser keeps for the next visit; nothing where it keeps nothing.
export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // It is forgotten when the page is closed.
  }
}

// Light or dark: as the system says, until the reader chooses.
export function applyTheme(theme = recall('theme')) {
  if (theme) document.documentElement.style.colorScheme = theme;
}

export function toggleTheme() {
  const chosen = document.documentElement.style.colorScheme;
  const isDark = chosen ? chosen === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  const theme = isDark ? 'light' : 'dark';
  keep('theme', theme);
  applyTheme(theme);
  dispatchEvent(new Event('themechange'));
}

// One tab stop for a group of many items: arrow keys, Home and End move inside it. Items have the attribute data-item.
export function moveInGroup(event) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const items = [...event.currentTarget.querySelectorAll('[data-item]')];
  const here = items.indexOf(event.target);
  if (here < 0) return;
  let there = here + (steps[event.key] ?? 0);
  if (event.key === 'Home') there = 0;
  if (event.key === 'End') there = items.length - 1;
  if (there === here || !items[there]) return;
  event.preventDefault();
  items[here].tabIndex = -1;
  items[there].tabIndex = 0;
  items[there].focus();
}
