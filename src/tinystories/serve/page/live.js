// The curves of runs as they grow: one connection for all of them, opened again when it breaks.
import { Failure, watch } from './api.js';
import { useEffect, useRef, useState } from './ui.js';

const MAX_POINTS = 8000; // of a run; beyond, every second one is dropped
const RETRY_MS = 2000;

const emptyFeed = () => ({ train: [], evals: [], final: null, after: 0, stride: 1, nDamaged: 0, firstDamaged: null, problem: null, nChanges: 0 });

// Take in an event of the server. The arrays are replaced, so that drawings notice.
export function takeIn(feed, event) {
  const next = { ...feed };
  if (event.restart) Object.assign(next, { train: [], evals: [], final: null, stride: 1, nDamaged: 0, firstDamaged: null });
  if ('problem' in event) next.problem = event.problem;
  if (event.has_changed) next.nChanges += 1;
  if (!event.records) return next;
  let [train, evals] = [[...next.train], [...next.evals]];
  for (const record of event.records) {
    const isEvaluation = record.evaluated || 'val_bits_per_byte' in record;
    const last = train.at(-1);
    if (last && record.step < last.step) { // a resumed run has gone back
      train = train.filter((one) => one.step < record.step);
      evals = evals.filter((one) => one.step < record.step);
    }
    if (isEvaluation) {
      const point = { ...record, seconds: train.at(-1)?.seconds ?? 0 };
      if (record.final) next.final = point;
      else evals = [...evals.filter((one) => one.step !== record.step), point];
    } else if ('loss' in record || 'learning_rate' in record) {
      if (train.at(-1)?.step === record.step) train.pop();
      train.push(record);
    }
  }
  if (train.length > MAX_POINTS) {
    const end = train.at(-1);
    train = train.filter((_, i) => i % 2 === 0);
    if (train.at(-1) !== end) train.push(end);
    next.stride *= 2;
  }
  next.stride = Math.max(next.stride, event.stride);
  next.nDamaged += event.n_damaged;
  next.firstDamaged ??= event.first_damaged;
  return { ...next, train, evals, after: event.after };
}

// Returns {name: feed} of the runs, and whether the connection is open.
export function useLive(names, fail, attempt) {
  const [feeds, setFeeds] = useState({});
  const [isOpen, setOpen] = useState(false);
  const current = useRef({});
  useEffect(() => {
    current.current = Object.fromEntries(names.map((name) => [name, emptyFeed()]));
    setFeeds(current.current);
    if (!names.length) return undefined;
    const abort = new AbortController();
    (async () => {
      while (!abort.signal.aborted) {
        const [first, ...others] = names;
        const query = new URLSearchParams([['after', current.current[first].after]]);
        others.forEach((name) => { query.append('also', name); query.append('also_after', current.current[name].after); });
        try {
          for await (const data of watch(`/lab/api/runs/${encodeURIComponent(first)}/metrics?${query}`, abort.signal)) {
            if (abort.signal.aborted) return;
            const event = JSON.parse(data);
            current.current = { ...current.current, [event.run]: takeIn(current.current[event.run], event) };
            setFeeds(current.current);
            setOpen(true);
          }
        } catch (error) {
          if (abort.signal.aborted) return;
          if (!(error instanceof Failure) || error.kind !== 'gone') {
            fail(error);
            return;
          }
        }
        setOpen(false);
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    })();
    const leave = () => abort.abort(); // a page that the browser keeps for its back button would go on listening
    addEventListener('pagehide', leave);
    return () => {
      removeEventListener('pagehide', leave);
      abort.abort();
    };
  }, [JSON.stringify(names), attempt]);
  return { feeds, isOpen };
}
