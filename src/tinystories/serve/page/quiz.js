// Which of two? The reader guesses first, then the model's answer is shown. Both scores are in the fragment.
import { ask } from './api.js';
import { useAnswer } from './answers.js';
import { Tools } from './figures.js';
import { pythonQuiz } from './python.js';
import { useGet } from './runs.js';
import { LAB as T } from './texts.js';
import { percent } from './tokens.js';
import { html, useEffect, useRef } from './ui.js';

// `quiz` has a digit for each answered item: 1 if the reader was right, plus 2 if the model was. `qi`: the item shown.
export function QuizTab({ state, go, model, fail, attempt, latest }) {
  const Q = T.experiments.quiz;
  const items = useGet('/lab/api/quiz', attempt, fail)?.items;
  const results = (/^[0-3]{0,99}$/.test(state.quiz ?? '') ? (state.quiz ?? '') : '').slice(0, items?.length ?? 0);
  const wanted = /^\d{1,2}$/.test(state.qi ?? '') ? Number(state.qi) : results.length;
  const number = Math.min(wanted, results.length);
  const isAnswered = number < results.length;
  const answer = useAnswer(ask, '/lab/api/quiz', items?.[number] ? { item: number, attempt } : null, fail);
  const truth = answer?.body.item === number ? answer.data : null; // known to the page before the guess, but not shown
  const current = useRef(null);
  const next = useRef(null);
  const right = (bit) => [...results].filter((digit) => Number(digit) & bit).length;

  function guess(word) {
    if (isAnswered || !truth || (latest.current.quiz ?? '') !== (state.quiz ?? '')) return;
    const digit = (word === truth.answer ? 1 : 0) + (truth.is_model_right ? 2 : 0);
    go({ quiz: results + digit, qi: number });
  }
  const advance = () => go({ qi: '' });
  const restart = () => go({ quiz: '', qi: '' });
  const item = items?.[number];
  current.current = { guess, advance, isAnswered, words: item?.words };
  useEffect(() => {
    const onKey = (event) => {
      if (event.target.matches('textarea, input:not([type=radio])') || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
      const now = current.current;
      if (/^[12]$/.test(event.key) && now.words && !now.isAnswered) now.guess(now.words[event.key - 1]);
      else if (event.key.toLowerCase() === 'n' && now.isAnswered) now.advance();
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', onKey);
    return () => removeEventListener('keydown', onKey);
  }, []);
  useEffect(() => { if (isAnswered && truth && document.activeElement === document.body) next.current?.focus({ preventScroll: true }); }, [isAnswered, truth]);

  if (!items) return null;
  const score = html`<p class="total" role="status">${results.length > 0 && Q.score(right(1), right(2), results.length)}</p>`;
  if (!item) {
    return html`<div class="card"><h3>${Q.finished}</h3>${score}<p>${Q.verdict(right(1), right(2), results.length)}</p>
      <div class="row"><button type="button" class="primary" onClick=${restart}>${Q.restart}</button></div></div>`;
  }
  const isReaderRight = isAnswered && Number(results[number]) & 1;
  const [before, after] = [item.context + item.before, item.after];
  return html`<div class="card quiz"><div class="row spread"><h3>${Q.number(number + 1, items.length)}</h3><span class="soft">${Q.tasks[item.task]}</span></div>
    <p class="passage">${before.split('\n').map((line, i) => html`${i ? html`<br />` : ''}${line}`)}<b class=${isAnswered ? 'gap' : 'gap open'}>${isAnswered && truth ? truth.answer : html`<span class="sr-only">${Q.gap}</span>`}</b>${after}</p>
    <div class="row answers" role="group" aria-label=${Q.choose}>${item.words.map((word, i) => html`<button type="button" data-word=${word} disabled=${isAnswered || !truth}
      class=${isAnswered && word === truth?.answer ? 'primary' : ''} onClick=${() => guess(word)}><kbd>${i + 1}</kbd> ${word}</button>`)}</div>
    <div aria-live="polite">${isAnswered && truth && html`<p><b>${isReaderRight ? Q.youRight : Q.youWrong(truth.answer)}</b></p>
      <p><b>${truth.is_model_right ? Q.modelRight : Q.modelWrong}</b> ${Q.modelSays(truth.answer, percent(truth.prob), truth.distractor, percent(1 - truth.prob))}</p>
      <p class="soft">${Q.alone(truth.answer, percent(truth.prob_alone))}</p>`}</div>
    ${isAnswered && html`<div class="row"><button type="button" class="primary" ref=${next} onClick=${advance}>${number + 1 < items.length ? Q.next : Q.finish}</button>
      <button type="button" onClick=${restart}>${Q.restart}</button></div>`}
    ${score}
    ${isAnswered && truth && html`<${Tools} name=${`question-${number + 1}`} data=${() => ({ question: number + 1, task: item.task, ...truth, is_reader_right: Boolean(isReaderRight) })}
      rows=${() => [['question', 'is_reader_right', 'is_model_right'], ...[...results].map((digit, i) => [i + 1, ...[1, 2].map((bit) => Boolean(Number(digit) & bit))])]}
      python=${() => pythonQuiz(model, item, truth)} />`}</div>`;
}
