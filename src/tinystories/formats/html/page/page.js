// The page: a beginning goes to the worker, the story comes back word by word.
import { makeFragment, readFragment } from '../../../serve/page/fragment.js';
import { LENGTHS, applyTheme, findEnd, moveInGroup, newSeed, toggleTheme } from '../../../serve/page/shared.js';
import { STORY } from '../../../serve/page/texts.js';
import { make, makeNextPane } from './next.js';

const TEXTS = {
  seed: 'Seed',
  seedHint: 'new each time',
  seedFormat: 'A whole number: 0, 1, 2, ...',
  opening: 'The storyteller is waking up …',
  failed: 'The storyteller cannot go on:',
  notOpened: 'The storyteller cannot be opened; perhaps this browser does not have enough memory for it:',
  noWorker: 'this browser does not let a page from a file compute on its own. Another browser may.',
  sameStory: 'The whole story on the command line:',
};
const MAX_TOKENS = 900;
const PARTS_ON_THEIR_WAY = 4; // of the weights, 4 MB each: more would only take memory
const SEED = /^\d{1,20}$/;
const SEED_FIELD = '\\s*\\d{1,20}\\s*'; // the pattern of the input, where spaces do no harm

// The worker runs the program of this page, which is in the element with that id. Its policy lets it load nothing else.
function startWorker() {
  const program = document.getElementById('program').textContent;
  return new Worker(URL.createObjectURL(new Blob([program], { type: 'text/javascript' })));
}

// Temperatures from very safe to very bold; the middle one is the model's own.
function temperaturesOf({ temperature }) {
  const steps = [0.4, 0.7, 1, 1.25, 1.5].map((factor) => Number(((temperature || 0.8) * factor).toFixed(3)));
  return steps.map((step, i) => (i === 2 ? temperature : step));
}

function quoteForShell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function buildPage(header) {
  const T = STORY;
  const temperatures = temperaturesOf(header.sampling);
  const waiting = new Map(); // questions for the pane, by number: {resolve, reject}
  let worker = null;
  let nPosted = 0; // parts of the weights that the worker has not read yet
  let outbox = []; // messages that wait until all parts are on their way; then null
  let number = 0; // of the newest message to the worker
  let telling = null; // the story that is coming: {id, text, length, temperature, seed, beginning}
  let story = null; // the story that is shown
  let hasChosenWord = false; // in this story, so that the pane shows what comes after that word
  let nRead = 0; // how often the address was read
  let frame = 0;

  // What the page consists of.
  const beginning = make('textarea', { id: 'beginning', rows: 3, maxlength: 1500, oninput: showBeginning, onkeydown: (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) start();
  } });
  const examples = make('div', { class: 'examples', role: 'group', 'aria-label': T.examplesLabel },
    ...T.examples.map((text) => make('button', { type: 'button', class: 'chip', onclick: () => setBeginning(text) }, text)));
  const lengths = Object.keys(LENGTHS).map((name) => make('input', { type: 'radio', name: 'length', value: name }));
  lengths[1].checked = true;
  const bold = make('output', { for: 'boldness' });
  const boldness = make('input', { id: 'boldness', type: 'range', min: 0, max: 4, step: 1, value: 2, oninput: showBoldness });
  const seed = make('input', { id: 'seed', inputmode: 'numeric', pattern: SEED_FIELD, title: TEXTS.seedFormat, maxlength: 20, autocomplete: 'off', placeholder: TEXTS.seedHint });
  const stopButton = make('button', { type: 'button', class: 'primary', onclick: stop }, T.stop);
  const tellButton = make('button', { class: 'primary' }, T.tell);
  const againButton = make('button', { type: 'button', onclick: () => start({ isNew: true }) }, T.again);
  const actions = make('div', { class: 'row actions' });
  const form = make('form', { class: 'card', onsubmit: (event) => { event.preventDefault(); start(); } },
    make('label', { class: 'big', for: 'beginning' }, T.beginning), beginning, examples,
    make('div', { class: 'settings' },
      make('fieldset', {}, make('legend', {}, T.length), make('div', { class: 'segments' },
        ...lengths.map((input) => make('label', {}, input, make('span', {}, T.lengths[input.value]))))),
      make('div', { class: 'slider' }, make('label', { for: 'boldness' }, T.boldness), boldness, bold),
      make('div', { class: 'seed' }, make('label', { for: 'seed' }, TEXTS.seed), seed)),
    actions);
  const opening = make('p', { class: 'opening hint', role: 'status' }, TEXTS.opening);
  const problem = make('p', { class: 'card notice', role: 'alert', hidden: true });
  const words = make('p', { class: 'words', onkeydown: moveInGroup });
  const cursor = make('span', { class: 'cursor', 'aria-hidden': 'true' });
  const notice = make('span', { role: 'status' });
  const command = make('code', { class: 'command' });
  const commandLine = make('p', { class: 'soft' }, TEXTS.sameStory, make('br'), command);
  const tools = make('div', {},
    make('div', { class: 'row tools' },
      make('button', { type: 'button', onclick: () => copy(story.text, T.copied) }, T.copy),
      make('button', { type: 'button', onclick: save }, T.save),
      make('button', { type: 'button', onclick: () => copy(location.href, T.linkCopied) }, T.link), notice),
    commandLine);
  const article = make('article', { class: 'card story', 'aria-label': T.storyLabel, tabindex: -1, hidden: true }, words);
  const hint = make('p', { class: 'hint', hidden: true }, T.wordHint);
  const spoken = make('div', { class: 'sr-only', 'aria-live': 'polite' }); // whole sentences, for screen readers
  const pane = makeNextPane({ ask, settings: header.sampling, vocabSize: header.config.vocab_size, getSeed: () => story?.seed ?? '1', fail });
  document.getElementById('app').replaceChildren(
    make('header', { class: 'top' }, make('h1', {}, header.title),
      make('button', { type: 'button', class: 'plain', onclick: toggleTheme, 'aria-label': T.theme, title: T.theme }, '◐')),
    form, opening, problem, article, hint, pane.element, spoken, make('p', { class: 'hint' }, T.footer));

  function fail(error, lead = TEXTS.failed) {
    opening.remove();
    problem.textContent = `${lead} ${error.message}`;
    problem.hidden = false;
  }

  // Without a storyteller nothing can be told; messages of the worker that follow only repeat it.
  function failToOpen(error, lead) {
    worker?.terminate();
    stop();
    tellButton.disabled = againButton.disabled = true;
    fail(error, lead);
  }

  function setBeginning(text) {
    beginning.value = text;
    showBeginning();
  }

  // Until a story is told, the pane shows what could come after its beginning.
  function showBeginning() {
    if (!story) pane.show(beginning.value.trimEnd());
  }

  function showBoldness() {
    bold.textContent = T.bold[boldness.value];
    boldness.setAttribute('aria-valuetext', T.bold[boldness.value]);
  }

  function showActions() {
    // Two elements: Stop must not become a submit button while it is being clicked. For the same reason the focus moves from
    // Stop to the story, not to Tell.
    const hadFocus = actions.contains(document.activeElement);
    actions.replaceChildren(telling ? stopButton : tellButton, ...(story && !telling ? [againButton] : []));
    if (hadFocus) (telling ? stopButton : article).focus({ preventScroll: true });
  }

  // The weights go to the worker in parts, of which only a few are on their way, and each leaves the memory of the page.
  function sendWeights() {
    const parts = [...document.querySelectorAll('.weights')];
    for (const part of parts.slice(0, PARTS_ON_THEIR_WAY - nPosted)) {
      worker.postMessage({ kind: 'weights', base64: part.textContent });
      nPosted += 1;
      part.textContent = ''; // sooner than by the garbage collector
      part.remove();
    }
    if (document.querySelector('.weights')) return;
    for (const message of outbox) worker.postMessage(message); // they arrive after the weights
    outbox = null;
    opening.remove();
  }

  // Messages of the worker.
  function receive({ data }) {
    if (data.isLoaded) {
      nPosted -= 1;
      if (outbox) sendWeights();
    } else if (data.failure) {
      const error = new Error(data.failure);
      if (!data.id) return failToOpen(error, TEXTS.notOpened);
      waiting.get(data.id)?.reject(error);
      waiting.delete(data.id);
      if (data.id !== telling?.id) return; // of a story that was stopped
      fail(error);
      stop();
    } else if (data.answer) {
      waiting.get(data.id)?.resolve(data.answer);
      waiting.delete(data.id);
    } else if (telling && data.id === telling.id) {
      grow(data);
    }
  }

  function send(message) {
    number += 1;
    const numbered = { ...message, id: number };
    if (outbox) outbox.push(numbered);
    else worker.postMessage(numbered);
    return number;
  }

  // What could come next, for the pane. A story that is being told goes on afterwards.
  function ask(question) {
    const id = send({ kind: 'next', question });
    return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
  }

  async function start({ isNew = false } = {}) {
    const given = seed.value.trim();
    if (given && !SEED.test(given)) return seed.reportValidity();
    if (tellButton.disabled) return;
    stop();
    problem.hidden = true;
    notice.textContent = '';
    const text = beginning.value.trimEnd();
    const length = lengths.find((input) => input.checked).value;
    const temperature = temperatures[boldness.value];
    const newest = { text, beginning: text, length, temperature, seed: given && !isNew ? given : String(newSeed()) };
    if (isNew) seed.value = '';
    telling = story = newest;
    hasChosenWord = false;
    const settings = { ...header.sampling, temperature };
    telling.id = send({ kind: 'tell', request: { prompt: text, seed: telling.seed, settings, maxTokens: MAX_TOKENS } });
    words.replaceChildren();
    spoken.textContent = '';
    article.hidden = hint.hidden = false;
    tools.remove();
    showActions();
    showStory();
    const fragment = await makeFragment({ b: text, len: length, bold: boldness.value, s: newest.seed });
    if (story === newest) history.replaceState(null, '', fragment); // otherwise another story has begun meanwhile
  }

  // Some more of the story has come.
  function grow({ text, reason }) {
    telling.text += text;
    const end = findEnd(telling.text, LENGTHS[telling.length], telling.beginning.length);
    if (end >= 0) telling.text = telling.text.slice(0, end);
    if (end >= 0 || reason) return stop();
    if (/[.!?]/.test(text)) spoken.textContent = telling.text;
    frame ||= requestAnimationFrame(showStory);
  }

  // The story ends here.
  function stop() {
    if (!telling) return;
    send({ kind: 'stop' });
    telling = null;
    spoken.textContent = story.text;
    showStory();
    showActions();
    article.append(tools);
    command.textContent = describeCommand(story);
    commandLine.hidden = story.beginning.includes('\0'); // which no command line can pass on
    if (!hasChosenWord) pane.show(story.text);
  }

  function describeCommand({ beginning: prompt, seed: number, temperature }) {
    const parts = [header.command, `--seed ${number}`, `--max-tokens ${MAX_TOKENS}`];
    if (prompt) parts.push(`--prompt ${quoteForShell(prompt)}`);
    if (temperature !== header.sampling.temperature) parts.push(`--temperature ${temperature}`);
    return parts.join(' ');
  }

  // Words that are shown stay as they are, and so does the focus; the last one may have grown.
  function showStory() {
    frame = 0;
    const parts = [...story.text.matchAll(/(\n+)|[^\S\n]+|\S+/g)];
    cursor.remove();
    while (words.childNodes.length > parts.length) words.lastChild.remove();
    if (words.lastChild?.matches?.('.word')) words.lastChild.textContent = parts[words.childNodes.length - 1][0];
    for (let i = words.childNodes.length; i < parts.length; i++) words.append(makeWord(parts[i]));
    if (telling) words.append(cursor);
  }

  function makeWord(part) {
    const text = part[0];
    if (part[1]) return make('span', {}, make('br'), make('span', { class: 'paragraph' }));
    if (!text.trim()) return document.createTextNode(' ');
    const open = () => {
      hasChosenWord = true;
      pane.show(story.text.slice(0, part.index).trimEnd(), { open: true });
    };
    const isFirst = !words.querySelector('.word');
    return make('span', {
      class: part.index < story.beginning.length ? 'word given' : 'word', role: 'button', 'data-item': true, tabindex: isFirst ? 0 : -1,
      onclick: open, onkeydown: (event) => event.key === 'Enter' && open(),
    }, text);
  }

  async function copy(text, done) {
    try {
      await navigator.clipboard.writeText(text);
      notice.textContent = done;
    } catch {
      notice.textContent = T.copyFailed;
    }
  }

  function save() {
    const link = make('a', { href: URL.createObjectURL(new Blob([`${story.text}\n`], { type: 'text/plain' })), download: 'story.txt' });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // A link to a story: when the page is opened, and when another one is pasted into the address of the open page.
  async function readAddress() {
    const number = (nRead += 1);
    const state = await readFragment();
    if (number !== nRead) return; // a newer address is being read
    const hasSeed = SEED.test(state.s ?? '');
    if (state.b === undefined && !hasSeed) return;
    (lengths.find((input) => input.value === state.len) ?? lengths[1]).checked = true;
    boldness.value = /^[0-4]$/.test(state.bold ?? '') ? state.bold : 2;
    showBoldness();
    seed.value = hasSeed ? state.s : '';
    setBeginning(state.b ?? '');
    if (hasSeed) start();
  }

  showBoldness();
  showActions();
  setBeginning(T.examples[0]);
  addEventListener('keydown', (event) => event.key === 'Escape' && stop());
  try {
    worker = startWorker();
  } catch {
    return failToOpen(new Error(TEXTS.noWorker));
  }
  worker.onmessage = receive;
  worker.onerror = () => failToOpen(new Error(TEXTS.noWorker));
  worker.postMessage({ kind: 'open', header });
  sendWeights();
  addEventListener('hashchange', readAddress);
  readAddress();
}

// An export is checked where there is a browser but no Node.js: #check=... runs stories at load, and the page then shows
// their ids instead of anything else.
function runCheck(header, fragment) {
  const { requests, plain } = JSON.parse(decodeURIComponent(fragment));
  const chunks = Array.from(document.querySelectorAll('.weights'), (element) => element.textContent);
  const results = JSON.stringify(runStories(header, chunks, requests, { plain }));
  const element = make('script', { id: 'check', type: 'application/json' }, results.replaceAll('<', '\\u003c'));
  document.body.replaceChildren(element);
}

const modelHeader = JSON.parse(document.getElementById('model').textContent);
applyTheme();
if (location.hash.startsWith('#check=')) runCheck(modelHeader, location.hash.slice('#check='.length));
else buildPage(modelHeader);
