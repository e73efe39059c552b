// The lab: one text, and panes that each answer a question about it. All state is in the URL's fragment.
import { useAnswer } from './answers.js';
import { ask, Failure, setKey } from './api.js';
import { AttentionPane } from './attention.js';
import { makeFragment, readFragment } from './fragment.js';
import { InsidePane } from './inside.js';
import { NextPane, readAppended } from './next.js';
import { isRecording, recording } from './recording.js';
import { LAB as T } from './texts.js';
import { makeTree } from './tree.js';
import { applyTheme, html, KeyForm, recall, render, toggleTheme, useEffect, useRef, useState, WRITING } from './ui.js';
import { WordsPane } from './words.js';

const PANES = { words: WordsPane, next: NextPane, attention: AttentionPane, inside: InsidePane, training: null, experiments: null };
// What many visits do not need is loaded when it is first opened.
const LATER = {
  training: () => import('./training.js').then((module) => module.TrainingPane),
  experiments: () => import('./experiments.js').then((module) => module.ExperimentsPane),
  tour: () => import('./tour.js').then((module) => module.Tour),
};

const URL_DELAY_MS = 250; // browsers take few changes of the URL in a second, and typing makes many
const RECORDED = ['words', 'next', 'attention', 'inside']; // panes that a recording has answers for

// What has this name in LATER: [component, failure], null before it is loaded and for no name.
function useLater(name, attempt) {
  const [loaded, setLoaded] = useState({});
  const [failure, setFailure] = useState(null);
  useEffect(() => {
    setFailure(null);
    if (!name || loaded[name]) return undefined;
    let isLate = false;
    LATER[name]().then((component) => setLoaded((before) => ({ ...before, [name]: component })),
      (error) => isLate || setFailure(new Failure('gone', error.message)));
    return () => { isLate = true; };
  }, [name, attempt]);
  return [(name && loaded[name]) ?? null, failure];
}

function Lab() {
  const [model, setModel] = useState(null);
  const [state, setState] = useState(null);
  const [problem, setProblem] = useState(null);
  const [attempt, setAttempt] = useState(0); // to ask again
  const [, setTheme] = useState(0);
  const latest = useRef(null); // the state, also for handlers of an earlier rendering
  const help = useRef(null);
  const writing = useRef(Promise.resolve());
  const nRestored = useRef(0); // of several ways back in a row, the last one counts
  const timer = useRef(null); // of a change that is not in the URL yet
  const tree = useRef(makeTree()); // of the paths that Next word has followed
  const [isTouring, setTouring] = useState(recall('tour') !== 'done' && !location.hash); // a link shows what it was made for
  const [hiddenPane, setHiddenPane] = useState(null); // by the tour: it would give the answer away

  // Change the state. `replace`: without a new entry for the back button.
  function go(changes, { replace = false } = {}) {
    const before = latest.current;
    const next = (latest.current = { ...before, ...changes });
    setState(next);
    const isWaiting = timer.current !== null;
    clearTimeout(timer.current);
    timer.current = null;
    if (replace) {
      timer.current = setTimeout(() => {
        timer.current = null;
        write(latest.current, 'replaceState');
      }, URL_DELAY_MS);
    } else {
      if (isWaiting) write(before, 'replaceState'); // where the back button leads
      write(next, 'pushState');
    }
  }

  function write(state, method) {
    writing.current = writing.current.then(async () => {
      const url = await makeFragment(state);
      if (url !== location.hash) history[method](null, '', url);
    });
  }

  async function restore() {
    const number = (nRestored.current += 1);
    clearTimeout(timer.current); // of what was typed at the place that is left
    timer.current = null;
    const state = await readFragment();
    if (number !== nRestored.current) return;
    const { t = T.example, p, ...rest } = isRecording ? { ...state, t: (await recording).text } : state;
    latest.current = { p: p in PANES ? p : 'words', t, ...rest };
    setState(latest.current);
  }

  function fail(error) {
    if (error && !(error instanceof Failure)) throw error;
    setProblem(error);
  }

  useEffect(() => {
    restore();
    const onTheme = () => setTheme((n) => n + 1);
    const themes = ['(prefers-color-scheme: dark)', 'print'].map((query) => matchMedia(query));
    addEventListener('popstate', restore);
    addEventListener('themechange', onTheme);
    themes.forEach((theme) => theme.addEventListener('change', onTheme));
    const onKey = (event) => {
      if (event.target.matches(WRITING) || event.ctrlKey || event.metaKey || event.altKey) {
        if (event.key === 'Escape') event.target.blur();
        return;
      }
      if (event.key === '/') {
        event.preventDefault();
        document.getElementById('text')?.focus();
      } else if (event.key === '?') {
        help.current?.showModal();
      }
    };
    addEventListener('keydown', onKey);
  }, []);

  useEffect(() => {
    ask('/lab/api/model').then((answer) => { setModel(answer); setProblem(null); }, fail);
  }, [attempt]);

  const append = readAppended(state);
  const question = state && model && { text: state.t, append, attempt };
  const answered = useAnswer(ask, '/lab/api/tokens', question, fail);
  const tokens = answered?.data;
  const isFresh = Boolean(answered) && answered.body.text === state.t && answered.body.append.join() === append.join();
  // Whether token `i` is in the newest text, too: while somebody types, what is shown is the text before.
  const isThere = (i) => isFresh || latest.current.t.startsWith(tokens.text.slice(0, tokens.pieces[i].end));
  const isMissing = isRecording && state && !RECORDED.includes(state.p);
  const [laterPane, paneFailure] = useLater(state && !isMissing && state.p in LATER ? state.p : null, attempt);
  const Pane = state && (PANES[state.p] ?? laterPane);
  const [Tour, tourFailure] = useLater(isTouring ? 'tour' : null, attempt);
  const trouble = problem ?? paneFailure ?? tourFailure;
  const retry = () => setAttempt((n) => n + 1);
  return html`<div class="lab">
    <header class="top"><h1>${T.title}</h1><nav>
      ${model && html`<span class="soft">${T.modelLine(model)}</span>`}
      ${!isRecording && html`<a href="/">${T.toStory}</a>`}
      <button type="button" onClick=${() => setTouring(true)}>${T.tour.start}</button>
      <button type="button" class="plain" onClick=${() => help.current.showModal()} aria-label=${T.help} title=${T.help}>?</button>
      <button type="button" class="plain" onClick=${toggleTheme} aria-label=${T.theme} title=${T.theme}>◐</button></nav></header>
    <nav class="rail" aria-label=${T.panes}>${state && Object.keys(PANES).map(
      (name) => html`<button type="button" aria-current=${state.p === name ? 'page' : null} onClick=${() => go({ p: name })}>
        ${T[name].name}<small>${T[name].question}</small></button>`,
    )}</nav>
    <main class="bench">
      ${trouble && (trouble.kind === 'key'
        ? html`<${KeyForm} texts=${T} onKey=${(key) => { setKey(key); retry(); }} />`
        : html`<div class="card notice" role="alert"><span>${T.problems[trouble.kind]}
            ${trouble.kind === 'refused' && html` <q>${trouble.message}</q>`}</span>
            ${trouble.kind !== 'recorded' && html`<div class="row"><button type="button" onClick=${retry}>${T.tryAgain}</button></div>`}</div>`)}
      ${state && html`<div><label class="soft" for="text">${T.text}</label>
        <textarea id="text" rows="2" readonly=${isRecording} value=${tokens && append.length ? tokens.text : state.t} spellcheck="false"
          onInput=${(event) => go({ t: event.target.value, a: '', c: '' }, { replace: true })}></textarea>
        ${isRecording && model && html`<p class="soft">${T.recorded(model.name)}</p>`}
        ${tokens?.n_dropped > 0 && html`<p class="soft">${T.dropped(tokens)}</p>`}</div>`}
      ${isTouring && Tour && tokens && model && html`<${Tour} tokens=${tokens} state=${state} go=${go} model=${model} isFresh=${isFresh} attempt=${attempt} onHide=${setHiddenPane} onEnd=${() => setTouring(false)} />`}
      ${hiddenPane && state?.p === hiddenPane && html`<p class="card soft">${T.tour.hidden}</p>`}
      ${isMissing && html`<p class="card notice">${T.problems.recorded}</p>`}
      ${Pane && tokens && model && !isMissing && state.p !== hiddenPane && html`<${Pane} key=${state.p} tokens=${tokens} state=${state} go=${go} model=${model}
        fail=${fail} attempt=${attempt} latest=${latest} tree=${tree} isFresh=${isFresh} isThere=${isThere} />`}
    </main>
    <dialog ref=${help} aria-label=${T.help}><p>${T.about}</p><h2>${T.keysTitle}</h2><dl class="facts">${T.keys.map(
      ([key, meaning]) => html`<dt><kbd>${key}</kbd></dt><dd>${meaning}</dd>`,
    )}</dl><form method="dialog"><button class="primary">${T.close}</button></form></dialog>
  </div>`;
}

applyTheme();
render(html`<${Lab} />`, document.getElementById('app'));
