// The page's own thread for the storyteller. It also runs in Node.js, by runStories, where an export is checked.
import { Storyteller } from './story.js';

const SLICE_MS = 16; // how long a story is told before the messages of the page are read, Stop among them

// Answers the messages of the page; each has a kind, and what the handler of that kind takes.
export function serveWorker(scope) {
  let storyteller = null;
  let current = null; // the story that is being told
  const channel = new MessageChannel();
  const waiting = []; // one of each story that lets others have their turn
  channel.port1.onmessage = () => waiting.shift()();
  const nextTurn = () => new Promise((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(null);
  });
  const handlers = {
    open({ header }) {
      storyteller = new Storyteller(header);
    },
    weights({ base64 }) {
      storyteller.engine.addWeights(base64);
      scope.postMessage({ isLoaded: true }); // the page sends the next part
    },
    async tell({ id, request }) {
      current = id;
      const startedAt = performance.now();
      let readAt = startedAt;
      let n = 0;
      for (const { text, reason } of storyteller.tell(request)) {
        if (!reason) n += 1;
        scope.postMessage({ id, text, reason, n, seconds: (performance.now() - startedAt) / 1000 });
        if (performance.now() - readAt < SLICE_MS) continue;
        await nextTurn();
        if (current !== id) return;
        readAt = performance.now();
      }
    },
    stop() {
      current = null;
    },
    next({ id, question }) {
      scope.postMessage({ id, answer: storyteller.whatNext(question) });
    },
  };
  scope.onmessage = async ({ data }) => {
    try {
      await handlers[data.kind](data);
    } catch (error) {
      scope.postMessage({ id: data.id, failure: error.message });
    }
  };
}

// The ids and texts of stories, one after the other. `chunks`: the weights in parts, as base64.
export function runStories(header, chunks, requests, options) {
  const storyteller = new Storyteller(header, options);
  for (const base64 of chunks) storyteller.engine.addWeights(base64);
  return requests.map((request) => {
    const items = [...storyteller.tell(request)];
    return { ids: items.flatMap(({ id }) => id ?? []), text: items.map(({ text }) => text).join('') };
  });
}

// The page's other script and Node.js look for this name.
globalThis.runStories = runStories;
if (typeof WorkerGlobalScope === 'function' && self instanceof WorkerGlobalScope) serveWorker(self);
