// One question at a time for each place that asks: while an answer is on its way, only the newest question waits.
import { useEffect, useRef, useState } from './ui.js';

// Returns {body, data} of the newest answer, or null. `body` null asks nothing; `fail` takes a Failure.
export function useAnswer(ask, path, body, fail) {
  const [answer, setAnswer] = useState(null);
  const state = useRef({ isBusy: false, newest: null });
  const key = JSON.stringify(body);
  useEffect(() => {
    const current = state.current;
    current.newest = body;
    if (body === null || current.isBusy) return;
    (async () => {
      current.isBusy = true;
      try {
        while (current.newest) {
          const question = current.newest;
          current.newest = null;
          try {
            const data = await ask(path, question);
            setAnswer({ body: question, data });
            fail(null);
          } catch (error) {
            if (!current.newest) fail(error); // what a newer question has replaced may fail
          }
        }
      } finally {
        current.isBusy = false;
      }
    })();
  }, [key]);
  return answer;
}
