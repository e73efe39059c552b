"""What the page's program answers besides stories: what could come next; and the messages of its worker."""

import dataclasses

import numpy as np
import pytest
from page_helpers import OPEN, OWN_SETTINGS, engine_storyteller, needs_node, page_data, run_script

from tinystories.config import SamplingConfig
from tinystories.formats.bundle import ModelBundle

NEXT = """
function answer({ questions, ...data }) {
  const storyteller = openStoryteller(data);
  return questions.map((question) => storyteller.whatNext(question));
}
"""


@needs_node
def test_what_could_come_next_is_what_the_python_api_says(model: ModelBundle) -> None:
    storyteller = engine_storyteller(model)
    settings = [
        OWN_SETTINGS,
        dataclasses.replace(OWN_SETTINGS, top_k=5, top_p=0.7, min_p=0.0, temperature=1.4),
        dataclasses.replace(OWN_SETTINGS, temperature=0.0),
    ]
    texts = ["Once upon a time", "", "Lily saw a cat. " * 40]  # the last is longer than the context
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    questions, expected = [], []
    for text in texts:
        for one in settings:
            draw = {"seed": "3", "index": 2}
            described = {name: getattr(one, name) for name in names}
            questions.append({"text": text, "settings": described, "top": 12, "draw": draw})
            expected.append(storyteller.next_token(text, **described))
    for answer, step in zip(
        run_script(OPEN + NEXT, page_data(model) | {"questions": questions}), expected, strict=True
    ):
        candidates = step.candidates(12)
        assert [one["id"] for one in answer["candidates"]] == [one.id for one in candidates]
        assert [one["cutBy"] for one in answer["candidates"]] == [one.cut_by for one in candidates]
        for name, probs in (("modelProb", "model_prob"), ("finalProb", "final_prob")):
            found = [one[name] for one in answer["candidates"]]
            assert found == pytest.approx([getattr(one, probs) for one in candidates], abs=1e-6)
        assert answer["nKept"] == step.n_kept
        assert answer["entropy"] == pytest.approx(step.entropy_bits, abs=1e-4)
        drawn = answer["drawn"]
        assert step.final_probs[drawn["id"]] > 0
        assert drawn["below"] <= drawn["u"] + 1e-6
        assert drawn["u"] <= drawn["below"] + drawn["finalProb"] + 1e-6


TELL = """
function answer({ questions, ...data }) {
  const storyteller = openStoryteller(data);
  const read = storyteller.engine.readToken.bind(storyteller.engine);
  let nRead = 0;
  storyteller.engine.readToken = (...args) => { nRead += 1; return read(...args); };
  return questions.map((question) => {
    nRead = 0;
    const { candidates } = storyteller.whatNext(question);
    return { nRead, best: candidates[0] };
  });
}
"""


@needs_node
def test_the_cache_keeps_what_two_questions_have_in_common(model: ModelBundle) -> None:
    """And a question gets the same answer whatever came before it."""
    settings = {field.name: getattr(OWN_SETTINGS, field.name) for field in dataclasses.fields(SamplingConfig)}
    texts = ["Once upon a time", "Once upon a time there was", "Once upon a time", "The cat", "Once upon a time"]
    questions = [{"text": text, "settings": settings} for text in texts]
    answers = run_script(OPEN + TELL, page_data(model) | {"questions": questions})
    n_ids = [1 + len(model.tokenizer.encode(text)) for text in texts]
    assert [answer["nRead"] for answer in answers][:3] == [n_ids[0], n_ids[1] - n_ids[0], 1]
    assert answers[4]["nRead"] == n_ids[4] - 1  # END is common
    assert answers[0]["best"] == answers[2]["best"] == answers[4]["best"]


WORKER = """
async function answer({ header, weights }) {
  const messages = [];
  const scope = { postMessage: (message) => message.isLoaded || messages.push(message) };
  serveWorker(scope);
  const send = (data) => scope.onmessage({ data });
  const settings = header.sampling;
  const question = { text: 'Once', settings, top: 3 };
  header.tokenizer.special_ids = []; // no token ends a story
  const waitFor = async (n) => { while (messages.length < n) await new Promise((resolve) => setImmediate(resolve)); };
  await send({ kind: 'open', header });
  await send({ kind: 'weights', base64: weights });
  const request = { prompt: 'Once', seed: '1', settings, maxTokens: 1e9 }; // without Stop it would take days
  const telling = send({ id: 1, kind: 'tell', request });
  await waitFor(5);
  await send({ id: 2, kind: 'next', question });
  await waitFor(messages.length + 20);
  await send({ id: 3, kind: 'stop' });
  await telling;
  const nWhenStopped = messages.length;
  await send({ id: 4, kind: 'tell', request: { ...request, maxTokens: 30 } });
  await send({ id: 5, kind: 'next', question: { ...question, settings: null } });
  return { messages, nWhenStopped };
}
"""


@needs_node
def test_the_worker_stops_and_answers_while_it_tells(model: ModelBundle) -> None:
    """A question in between does not change the story, which shares the cache with it; what fails is reported."""
    answer = run_script(OPEN + WORKER, page_data(model))
    messages, n = answer["messages"], answer["nWhenStopped"]
    first, second = ([one["text"] for one in part if "text" in one] for part in (messages[:n], messages[n:]))
    assert not [one for one in messages[:n] if one.get("reason")]
    assert [one["id"] for one in messages[:n] if "answer" in one] == [2]
    assert first[:25] == second[:25]
    assert messages[-2]["reason"] == "length"
    assert messages[-1]["id"] == 5
    assert messages[-1]["failure"]


AGAIN = """
async function answer({ header, weights }) {
  const ended = [];
  const scope = { postMessage: ({ id, reason }) => reason && ended.push(id) };
  serveWorker(scope);
  const send = (data) => scope.onmessage({ data });
  header.tokenizer.special_ids = []; // no token ends a story
  await send({ kind: 'open', header });
  await send({ kind: 'weights', base64: weights });
  const request = { prompt: '', seed: '1', settings: header.sampling };
  const tell = (id, maxTokens) => send({ id, kind: 'tell', request: { ...request, maxTokens } });
  await Promise.all([tell(1, 1e9), tell(2, 1e9), tell(3, 300)]);
  return ended;
}
"""


@needs_node
def test_only_the_newest_of_several_stories_is_told_to_its_end(model: ModelBundle) -> None:
    """The others end, too: none waits forever for its next turn."""
    assert run_script(OPEN + AGAIN, page_data(model)) == [3]


@needs_node
def test_damaged_weights_are_reported(model: ModelBundle) -> None:
    name = "norm.weight"
    weights = dict(model.weights) | {name: np.full_like(model.weights[name], np.nan)}
    script = (
        OPEN
        + """
    function answer(data) {
      const request = { prompt: '', seed: '1', settings: data.header.sampling, maxTokens: 3 };
      try { return [...openStoryteller(data).tell(request)]; } catch (error) { return error.message; }
    }"""
    )
    assert run_script(script, page_data(dataclasses.replace(model, weights=weights))).endswith("damaged")
