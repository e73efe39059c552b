// The paths that were followed from a text, as a tree: the last three, and twelve tokens of each.
import { percent } from './tokens.js';
import { html, moveInGroup } from './ui.js';

const MAX_PATHS = 3;
export const MAX_DEPTH = 12;
const [WIDTH, HEIGHT] = [116, 44]; // of a cell, in pixels

// A node has the token's id, label and probability p (null: not known), its children, and when it was last on the path.
export const makeTree = () => ({ text: null, clock: 0, root: { children: [], used: 0 } });

// Put a path [{id, label, p}] from a text into the tree. What was remembered from another text is forgotten.
export function remember(tree, text, path) {
  if (tree.text !== text) Object.assign(tree, makeTree(), { text });
  tree.clock += 1;
  let node = tree.root;
  for (const { id, label, p } of path) {
    let child = node.children.find((one) => one.id === id);
    if (!child) node.children.push((child = { id, label, p: null, children: [] }));
    child.p = p ?? child.p;
    child.used = tree.clock;
    node = child;
  }
  while (findPaths(tree.root).length > MAX_PATHS) forgetOldest(tree.root);
}

// All paths from a node to its leaves, as lists of nodes.
function findPaths(node) {
  if (!node.children.length) return [[]];
  return node.children.flatMap((child) => findPaths(child).map((path) => [child, ...path]));
}

function forgetOldest(root) {
  const oldest = findPaths(root).reduce((a, b) => (b.at(-1).used < a.at(-1).used ? b : a));
  const lengths = oldest.map((_, i) => (i ? oldest[i - 1] : root).children.length);
  const fork = lengths.findLastIndex((n) => n > 1); // the part behind it belongs to this path alone
  const parent = fork ? oldest[fork - 1] : root;
  parent.children.splice(parent.children.indexOf(oldest[fork]), 1);
}

// Where the nodes are drawn: [{node, ids (of the path to it), row, column, parent (its place)}], at most MAX_DEPTH
// columns, the last ones of the current path of ids.
export function layOut(tree, current) {
  const first = Math.max(0, current.length - MAX_DEPTH);
  let start = tree.root;
  for (const id of current.slice(0, first)) start = start?.children.find((child) => child.id === id);
  const places = [];
  let row = 0;
  const visit = (node, ids, column, parent) => {
    const place = { node, ids, row, column, parent };
    if (column >= 0) places.push(place);
    const children = column + 1 < MAX_DEPTH ? node.children : [];
    children.forEach((child, i) => {
      if (i) row += 1;
      visit(child, [...ids, child.id], column + 1, column >= 0 ? place : null);
    });
  };
  if (start) visit(start, current.slice(0, first), -1, null);
  return places;
}

export const isOnPath = (ids, current) => ids.every((id, i) => id === current[i]);

export function Tree({ tree, current, label, onGo }) {
  const places = layOut(tree, current);
  if (!places.length) return null;
  const nRows = 1 + Math.max(...places.map((place) => place.row));
  const nColumns = 1 + Math.max(...places.map((place) => place.column));
  const isLast = (place) => place.ids.length === current.length && isOnPath(place.ids, current);
  const anyLast = places.some(isLast);
  return html`<div class="scroll"><div class="tree" role="group" aria-label=${label} onKeyDown=${moveInGroup}
      style=${{ width: `${nColumns * WIDTH}px`, height: `${nRows * HEIGHT}px` }}>
    <svg aria-hidden="true" width=${nColumns * WIDTH} height=${nRows * HEIGHT}>${places.map((place) => place.parent && html`<path
      class=${isOnPath(place.ids, current) ? 'on' : ''} d=${linkBetween(place.parent, place)} />`)}</svg>
    ${places.map((place, i) => html`<button type="button" data-item data-path=${place.ids.join()} class=${isOnPath(place.ids, current) ? 'on' : ''}
      tabindex=${isLast(place) || (!anyLast && i === 0) ? 0 : -1} aria-current=${isLast(place) ? 'step' : null}
      style=${{ left: `${place.column * WIDTH}px`, top: `${place.row * HEIGHT}px`, width: `${WIDTH - 14}px` }}
      onClick=${() => onGo(place.ids)}>${place.node.label} <small>${percent(place.node.p)}</small></button>`)}
  </div></div>`;
}

// A line from the right side of a node to the left side of its child.
export function linkBetween(from, to, [width, height] = [WIDTH, HEIGHT]) {
  const [x1, y1] = [(from.column + 1) * width - 14, (from.row + 0.5) * height - 2];
  const [x2, y2] = [to.column * width, (to.row + 0.5) * height - 2];
  return `M${x1} ${y1} C${x1 + 10} ${y1} ${x2 - 10} ${y2} ${x2} ${y2}`;
}
