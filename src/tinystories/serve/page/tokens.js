// Tokens as chips, and what all panes say about them.
import { html, moveInGroup } from './ui.js';

export { percent } from './shared.js';
export const bits = (b) => (b === null || b === undefined ? '–' : `${b.toFixed(2)} bits`);

// "·dog" begins with a space, "↵" is a line break, "\xf0" part of a character, END the end of a story.
export function readLabel(label) {
  if (label === 'END') return { text: '¶', kind: 'end' };
  if (/^(\\x[0-9a-f]{2})+$/.test(label)) return { text: label, kind: 'bytes' };
  if (label === '·') return { text: '␣', kind: 'spaced' };
  return label.startsWith('·') ? { text: label.slice(1), kind: 'spaced' } : { text: label, kind: '' };
}

// One button for each token. `look(i)` gives {style, className, title}, `onPick(i)` is called on click and Enter.
export function Chips({ pieces, selected, look, onPick, onPoint, label, children }) {
  return html`<div class="chips" role="group" aria-label=${label} onKeyDown=${moveInGroup} onMouseLeave=${() => onPoint?.(null)}>
    ${pieces.map((piece, i) => {
      const { text, kind } = readLabel(piece.label);
      const { style, className = '', title } = look(i);
      return html`<button type="button" class=${`token ${kind} ${className}`} style=${style} data-item data-index=${i}
          tabindex=${i === (selected ?? 0) ? 0 : -1} aria-pressed=${i === selected} title=${title} aria-label=${`${piece.label}, ${title}`}
          onClick=${() => onPick(i)} onFocus=${() => onPoint?.(i)} onMouseEnter=${() => onPoint?.(i)}>${text}</button>
        ${text.includes('↵') && html`<span class="break"></span>`}`;
    })}${children}</div>`;
}
