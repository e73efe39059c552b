// Preact and htm, joined: html`<b>...</b>` makes elements without a build step.
import { h, render } from './vendor/preact.mjs';
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from './vendor/hooks.mjs';
import htm from './vendor/htm.mjs';

export const html = htm.bind(h);
export { render, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState };

// Where keys write, instead of being commands.
export const WRITING = 'textarea, input:not([type=range])';

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
