// Preact and htm, joined: html`<b>...</b>` makes elements without a build step.
import { h, render } from './vendor/preact.mjs';
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from './vendor/hooks.mjs';
import htm from './vendor/htm.mjs';

export { applyTheme, keep, moveInGroup, recall, toggleTheme } from './shared.js';

export const html = htm.bind(h);
export { render, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState };

// Where keys write, instead of being commands.
export const WRITING = 'textarea, input:not([type=range])';

// A form for the key of a server that has one. It is kept until this tab is closed.
export function KeyForm({ texts, onKey }) {
  const submit = (event) => {
    event.preventDefault();
    onKey(new FormData(event.target).get('key').trim());
  };
  return html`<form class="card notice" onSubmit=${submit}>
    <label for="key">${texts.keyNeeded}</label>
    <div class="row"><input id="key" name="key" type="password" autocomplete="off" required />
      <button class="primary">${texts.useKey}</button></div>
  </form>`;
}
