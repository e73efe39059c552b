// The storyteller: a beginning goes to the server, the story comes back word by word.
import { Failure, setKey, tell } from './api.js';
import { makeFragment, readFragment } from './fragment.js';
import { LENGTHS, findEnd, newSeed } from './shared.js';
import { STORY as T } from './texts.js';
import { applyTheme, html, KeyForm, moveInGroup, render, toggleTheme, useEffect, useRef, useState } from './ui.js';

const MAX_TOKENS = 900;
const BOLDNESS = [0.3, 0.55, 0.8, 1.0, 1.2]; // temperatures

function Storyteller() {
  const [wish, setWish] = useState({ beginning: T.examples[0], length: 'medium', boldness: 2, seed: 0 });
  const [story, setStory] = useState('');
  const [nGiven, setGiven] = useState(0); // characters of the story that were its beginning
  const [spoken, setSpoken] = useState(''); // whole sentences, for screen readers
  const [isTelling, setTelling] = useState(false);
  const [problem, setProblem] = useState(null);
  const [notice, setNotice] = useState('');
  const running = useRef(null);
  const newest = useRef(null); // what `running` was last, also when it has ended

  async function start(changes = {}) {
    running.current?.abort();
    const abort = (newest.current = running.current = new AbortController());
    const now = { ...wish, seed: newSeed(), ...changes };
    setWish(now);
    setProblem(null);
    setNotice('');
    setTelling(true);
    const beginning = now.beginning.trimEnd();
    let text = beginning;
    setStory(text);
    setGiven(beginning.length);
    setSpoken('');
    const url = await makeFragment({ b: beginning, len: now.length, bold: now.boldness, s: now.seed });
    if (newest.current !== abort) return; // another story has begun meanwhile
    history.replaceState(null, '', url);
    const request = { prompt: beginning, seed: now.seed, temperature: BOLDNESS[now.boldness], max_tokens: MAX_TOKENS };
    try {
      for await (const piece of tell(request, abort.signal)) {
        text += piece;
        const end = findEnd(text, LENGTHS[now.length], beginning.length);
        if (end >= 0) text = text.slice(0, end);
        setStory(text);
        if (end >= 0) break;
        if (/[.!?]/.test(piece)) setSpoken(text);
      }
      setSpoken(text);
    } catch (error) {
      if (error.name === 'AbortError') return; // Stop, or a newer story
      if (!(error instanceof Failure)) throw error;
      setProblem(error);
    } finally {
      abort.abort(); // frees the slot of a story that ends early
      if (running.current === abort) {
        running.current = null;
        setTelling(false);
      }
    }
  }

  function stop() {
    running.current?.abort();
    running.current = null;
    setTelling(false);
  }

  useEffect(() => {
    readFragment().then((state) => {
      if (!state.b) return;
      const length = state.len in LENGTHS ? state.len : 'medium';
      const changes = { beginning: state.b, length, boldness: BOLDNESS[state.bold] ? Number(state.bold) : 2 };
      setWish((before) => ({ ...before, ...changes }));
      if (/^\d{1,10}$/.test(state.s)) start({ ...changes, seed: Number(state.s) });
    });
    const onKey = (event) => event.key === 'Escape' && stop();
    addEventListener('keydown', onKey);
    addEventListener('pagehide', stop); // a page that the browser keeps for its back button would go on listening
  }, []);

  async function copy(text, done) {
    try {
      await navigator.clipboard.writeText(text);
      setNotice(done);
    } catch {
      setNotice(T.copyFailed);
    }
  }

  function save() {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([`${story}\n`], { type: 'text/plain' }));
    link.download = 'story.txt';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const set = (changes) => setWish({ ...wish, ...changes });
  const submit = (event) => {
    event.preventDefault();
    start();
  };
  return html`<main>
    <header class="top"><h1>${T.title}</h1><nav><a href="/lab">${T.toLab}</a>
      <button type="button" class="plain" onClick=${toggleTheme} aria-label=${T.theme} title=${T.theme}>◐</button></nav></header>
    <form class="card" onSubmit=${submit}>
      <label class="big" for="beginning">${T.beginning}</label>
      <textarea id="beginning" rows="3" maxlength="1500" value=${wish.beginning}
        onInput=${(event) => set({ beginning: event.target.value })}
        onKeyDown=${(event) => event.key === 'Enter' && (event.ctrlKey || event.metaKey) && start()}></textarea>
      <div class="examples" role="group" aria-label=${T.examplesLabel}>${T.examples.map(
        (example) => html`<button type="button" class="chip" onClick=${() => set({ beginning: example })}>${example}</button>`,
      )}</div>
      <div class="settings">
        <fieldset><legend>${T.length}</legend><div class="segments">${Object.keys(LENGTHS).map(
          (name) => html`<label><input type="radio" name="length" value=${name} checked=${wish.length === name}
            onChange=${() => set({ length: name })} /><span>${T.lengths[name]}</span></label>`,
        )}</div></fieldset>
        <div class="slider"><label for="boldness">${T.boldness}</label>
          <input id="boldness" type="range" min="0" max="4" step="1" value=${wish.boldness} aria-valuetext=${T.bold[wish.boldness]}
            onInput=${(event) => set({ boldness: Number(event.target.value) })} />
          <output for="boldness">${T.bold[wish.boldness]}</output></div>
      </div>
      <div class="row actions">
        ${isTelling // two elements: Stop must not become a submit button while it is being clicked
          ? html`<button key="stop" type="button" class="primary" onClick=${stop}>${T.stop}</button>`
          : html`<button key="tell" class="primary">${T.tell}</button>`}
        ${story && !isTelling && html`<button type="button" onClick=${() => start()}>${T.again}</button>`}
      </div>
    </form>
    ${problem && (problem.kind === 'key'
      ? html`<${KeyForm} texts=${T} onKey=${(key) => { setKey(key); start({ seed: wish.seed }); }} />`
      : html`<p class="card notice" role="alert">${T.problems[problem.kind]}
          ${problem.kind === 'refused' && html` <q>${problem.message}</q>`}</p>`)}
    ${story && problem?.kind !== 'key' && html`<article class="card story" aria-label=${T.storyLabel}>
      <${Words} story=${story} nGiven=${nGiven} isTelling=${isTelling} />
      ${!isTelling && html`<div class="row tools">
        <button type="button" onClick=${() => copy(story, T.copied)}>${T.copy}</button>
        <button type="button" onClick=${save}>${T.save}</button>
        <button type="button" onClick=${() => copy(location.href, T.linkCopied)}>${T.link}</button>
        <span role="status">${notice}</span></div>`}
    </article><p class="hint">${T.wordHint}</p>`}
    <div class="sr-only" aria-live="polite">${spoken}</div>
    <footer>${T.footer}</footer>
  </main>`;
}

// The story; every word leads to the lab.
function Words({ story, nGiven, isTelling }) {
  const parts = [...story.matchAll(/(\n+)|[^\S\n]+|\S+/g)];
  const open = async (offset) => {
    location.href = `/lab${await makeFragment({ p: 'words', t: story, c: offset })}`;
  };
  return html`<p class="words" onKeyDown=${moveInGroup}>${parts.map((part, i) => {
    if (part[1]) return html`<br /><span class="paragraph"></span>`;
    if (!part[0].trim()) return ' ';
    return html`<span class=${part.index < nGiven ? 'word given' : 'word'} role="link" data-item tabindex=${i === 0 ? 0 : -1}
      onClick=${() => open(part.index)} onKeyDown=${(event) => event.key === 'Enter' && open(part.index)}>${part[0]}</span>`;
  })}${isTelling && html`<span class="cursor" aria-hidden="true"></span>`}</p>`;
}

applyTheme();
render(html`<${Storyteller} />`, document.getElementById('app'));
