"""The tasks `characters` and `things`: which items stories give, and what models score on them."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tokenizers

from tinystories import Storyteller, UserError
from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.dataset import open_split
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Ids
from tinystories.evaluate.items import (
    MAX_STORY_CHARS,
    TASKS,
    Item,
    WordCounts,
    build_items,
    find_characters,
    find_things,
    split_sentences,
)
from tinystories.evaluate.tasks import build_task, evaluate_task, read_texts, score_items

NAMES = ("Tom", "Sam", "Ben", "Max")
OBJECTS = ("ball", "kite", "spoon", "drum")
IdScore = Callable[[Ids, int], float]


class StubEngine:
    """The log-probability of the id at `position` is whatever the function says."""

    n_slots = 1

    def __init__(self, score: IdScore, n_ctx: int = 512) -> None:
        self.config = ModelConfig(vocab_size=400, n_ctx=n_ctx)
        self.score = score

    def unused(self, *_: object) -> NoReturn:
        raise AssertionError("evaluation needs no slots")

    prefill = step = free = unused

    def logprobs(self, sequences: Sequence[Ids]) -> list[np.ndarray]:
        assert all(2 <= len(ids) <= self.config.n_ctx + 1 for ids in sequences)
        return [np.array([self.score(ids, i) for i in range(1, len(ids))], dtype=np.float32) for ids in sequences]


def copy_score(ids: Ids, position: int) -> float:
    """An id is certain if it has followed the two ids before it already; every other id is unlikely."""
    earlier = {tuple(ids[i : i + 3]) for i in range(position - 2)}
    return 0.0 if tuple(ids[position - 2 : position + 1]) in earlier else -10.0


def unigram_score(ids: Ids, position: int) -> float:
    """Every id has its own probability, whatever comes before it."""
    return -1 - (int(ids[position]) * 37 % 101) / 10


@pytest.fixture(scope="module")
def tokenizer(sample_data: Path) -> Tokenizer:
    return Tokenizer.load(sample_data)


@pytest.fixture
def storyteller(tokenizer: Tokenizer) -> Callable[[IdScore], Storyteller]:
    return lambda score: Storyteller(StubEngine(score), tokenizer, SamplingConfig())


def known_stories() -> dict[str, list[str]]:
    """Stories that say twice who acts, or what is meant, for each order of each pair."""
    character_stories, thing_stories = [], []
    for a, b in itertools.permutations(NAMES, 2):
        facts = [f"Yesterday {a} kicked a ball.", f"Yesterday {b} sang a song."]
        for first, second in itertools.permutations(facts):
            character_stories.append(f"It was hot. {first} {second} {a} kicked a ball.")
    for a, b in itertools.permutations(OBJECTS, 2):
        facts = [f"Tom took the {a}.", f"Tom saw a {b}."]
        for first, second in itertools.permutations(facts):
            thing_stories.append(f"It was hot. {first} {second} Today Tom took the {a} and ran.")
    return {"characters": character_stories, "things": thing_stories}


@pytest.mark.parametrize("task", TASKS)
def test_known_stories_give_exactly_the_known_items(task: str) -> None:
    stories = known_stories()[task]
    words = NAMES if task == "characters" else OBJECTS
    expected = []
    for number, (a, b) in enumerate(pair for pair in itertools.permutations(words, 2) for _ in range(2)):
        before, after = ("", " kicked a ball.") if task == "characters" else ("Today Tom took the ", " and ran.")
        context = stories[number].removesuffix(before + a + after)
        assert len(context) < len(stories[number])
        expected.append(Item(story=number, context=context, before=before, answer=a, distractor=b, after=after))
    assert build_items(TASKS[task], stories) == expected


# Each story, and (answer, distractor, rest of the sentence) of its candidates.
CHARACTER_STORIES = {
    "One day, Tom saw his friend Sam. Tom was glad.": [("Tom", "Sam", " was glad.")],
    # The adverbial, and the connecting word, are part of the sentence.
    "One day, Tom met Sam. The next day, Sam went home. But Tom did not.": [
        ("Sam", "Tom", " went home."),
        ("Tom", "Sam", " did not."),
    ],
    # A speaker after the quotation; nothing inside it, even if a sentence begins there.
    'One day, Tom met Sam. "Hello. Tom ran home. Is it nice," asked Sam. "It is," Tom said.': [
        ("Sam", "Tom", "."),
        ("Tom", "Sam", " said."),
    ],
    'One day, Tom met Sam. "Who is it?" asked Sam.': [("Sam", "Tom", ".")],
    # Nobody can know which of the two it was, if both did something together.
    "One day, Tom met Sam. They played. Tom was happy.": [],
    "One day, Tom and Sam went out. Tom was happy.": [],
    'One day, Tom met Sam and Lily. "Hi," Sam and Lily said.': [],
    # The sentence gives the answer away: by the other name, a pronoun, or "both".
    "One day, Tom met Lily. Lily liked Tom. Lily took a ball with her.": [],
    "One day, Tom met Sam. Sam liked both.": [],
    # Only one of them has been mentioned; no character; not at the start of a sentence.
    "One day, Tom went home. Tom met Sam.": [],
    "One day, Tom went home on Monday. Tom slept.": [],
    "One day, Tom met Sam. A dog saw Tom run.": [],
    # A title is no end of a sentence; whom it belongs to is not a name of one word.
    "One day, Tom met Sam and Mr. Fox. Sam saw a dog of Mr. Fox run.": [("Sam", "Tom", " saw a dog of Mr. Fox run.")],
}


@pytest.mark.parametrize("story", CHARACTER_STORIES)
def test_a_character_that_acts_is_recognized(story: str) -> None:
    candidates = [item for item, _ in find_characters(0, story, WordCounts([story]))]
    assert [(item.answer, item.distractor, item.after) for item in candidates] == CHARACTER_STORIES[story]
    for item in candidates:
        assert story.startswith(item.context + item.before + item.answer + item.after)


START = "Tom had a ball and a kite. He liked a kite. "
OTHER_STORIES = [
    "I took the ball and ran. I took the kite and ran. I ran to the park. I ran to the pond. I sat in the park.",
    "I took the dog. I took the wooden drum.",
]
THING_STORIES = {
    START + "Tom took the ball.": [("ball", "kite", ".")],
    START + "Tom took his ball and ran.": [("ball", "kite", " and ran.")],
    # No other story has "found the kite", so the sentence alone would give the answer away.
    START + "Tom found the ball.": [],
    # An adjective, a plural, an animal, two things at once, a thing that talks.
    START + "Tom took the ball game.": [],
    START + "Tom took the ball and the hat.": [],
    START + "Tom took the ball, the hat and a pen.": [],
    "Tom had a ball and a wooden red kite. Tom took the ball.": [],
    START + "A kite smiled. Tom took the ball.": [],
    "Tom had a ball and a dog. Tom took the ball.": [],
    # The kite is in the sentence, too, or is a part of the ball.
    START + "Tom took the ball to a kite.": [],
    START + "It was a ball with a kite. Tom took the ball.": [],
    # Places are compared with places, but not where one is in the other.
    "Tom saw a park and a pond. He ran to the pond.": [("pond", "park", ".")],
    "Tom saw a park and a ball. He ran to the park.": [],
    "Tom saw a park and a pond. He sat in the pond.": [],
}


@pytest.mark.parametrize("story", THING_STORIES)
def test_a_thing_that_is_meant_is_recognized(story: str) -> None:
    candidates = [item for item, _ in find_things(0, story, WordCounts([story, *OTHER_STORIES]))]
    assert [(item.answer, item.distractor, item.after) for item in candidates] == THING_STORIES[story]
    for item in candidates:
        assert story.startswith(item.context + item.before + item.answer + item.after)


def test_a_story_is_split_into_sentences() -> None:
    story = 'Tom ran. "Stop!" he said.  Mr. Fox did.\n\nThe end'
    parts = [story[start:stop] for start, stop in split_sentences(story)]
    assert parts == ["Tom ran.", '"Stop!"', "he said.", "Mr. Fox did.", "The end"]
    assert [story[start:stop] for start, stop in split_sentences("")] == [""]


def test_the_same_stories_give_the_same_items() -> None:
    stories = list(iter_stories("sample"))
    for find in TASKS.values():
        items = build_items(find, stories)
        assert items
        assert items == build_items(find, stories)
        assert [item.story for item in items] == sorted(item.story for item in items)
        for item in items:
            assert stories[item.story].startswith(item.context + item.before + item.answer + item.after)


@pytest.mark.parametrize("task", TASKS)
def test_shallow_rules_are_right_in_half_of_the_items(task: str) -> None:
    """The word mentioned last, the word mentioned more often, and the more common name tell nothing."""
    stories = list(iter_stories("sample"))
    counts = WordCounts(stories)
    cues = {
        (item.story, item.context, item.answer, item.distractor): cues
        for number, story in enumerate(stories)
        for item, cues in TASKS[task](number, story, counts)
    }
    items = build_items(TASKS[task], stories)
    of_items = np.array([cues[item.story, item.context, item.answer, item.distractor] for item in items])
    assert (of_items.sum(axis=0) == 0).all()
    assert (of_items != 0).any(axis=0).all()
    # Computed once more from the text alone.
    last = [np.sign(x.context.rfind(x.answer) - x.context.rfind(x.distractor)) for x in items]
    assert [int(sign) for sign in last] == of_items[:, 0].tolist()


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_copies_is_perfect_and_one_that_ignores_the_context_is_at_chance(
    task: str, storyteller: Callable[[IdScore], Storyteller]
) -> None:
    items = build_task(task, known_stories()[task])
    done: list[int] = []
    copying, _ = evaluate_task(storyteller(copy_score), items, done.append)
    assert (copying.accuracy, copying.interval) == (1.0, (1.0, 1.0))
    assert (copying.items, copying.stories) == (24, 24)
    assert copying.sentence_alone == 0.5
    assert done == [24]
    ignorant, scores = evaluate_task(storyteller(unigram_score), items)
    assert ignorant.accuracy == 0.5 == ignorant.sentence_alone
    assert ignorant.interval[0] < 0.5 < ignorant.interval[1]
    assert (scores.in_story != 0).all()
    # A model that knows nothing finds both words equally likely: ties count half, in each story.
    same, scores = evaluate_task(storyteller(lambda *_: 0.0), items)
    assert (same.accuracy, same.interval) == (0.5, (0.5, 0.5))
    assert not scores.in_story.any()


def test_what_is_scored_is_the_word_and_the_rest_of_the_sentence(tokenizer: Tokenizer) -> None:
    """Token by token, with a context shorter than the story."""
    item = Item(story=0, context="Sam saw Tom. " * 9, before="Then ", answer="Tom", distractor="Sam", after=" ran off.")

    def score(ids: Ids, position: int) -> float:
        return -(int(ids[position]) % 7) - int(ids[position - 1]) % 5 / 10

    texts = [f"{item.context}Then {word} ran off." for word in ("Tom", "Sam")]
    a, b = ([tokenizer.end_id, *tokenizer.encode(text)] for text in texts)
    n_same = next(i for i in range(len(a)) if a[i] != b[i])
    assert n_same > 48
    expected = [sum(score(ids, i) for i in range(n_same, len(ids))) for ids in (a, b)]
    for n_ctx in (512, 48):
        scores = score_items(StubEngine(score, n_ctx), tokenizer, [item])
        assert scores.in_story[0] == pytest.approx(expected[0] - expected[1], rel=1e-6)


def test_words_that_a_tokenizer_does_not_know_are_a_tie() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "ran": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    item = Item(story=0, context="Sam saw Tom. ", before="", answer="Tom", distractor="Sam", after=" ran")
    scores = score_items(StubEngine(copy_score), Tokenizer(backend.to_str()), [item])
    assert (scores.in_story[0], scores.sentence_alone[0]) == (0, 0)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_probabilities_that_are_not_finite_are_refused(logprob: float, tokenizer: Tokenizer) -> None:
    items = build_task("characters", known_stories()["characters"])
    with pytest.raises(UserError, match="not finite"):
        score_items(StubEngine(lambda *_: logprob), tokenizer, items)


HOSTILE = {
    "empty": "",
    "no sentences": "Tom saw Sam " * 1600,
    "only punctuation": '."!?' * 5000,
    "only line breaks": "\n" * 20_000,
    "hundreds of names": " ".join(f"He saw A{chr(97 + i % 26)}{chr(97 + i // 26)}. " for i in range(600)),
    "hundreds of things": " ".join(f"I took the x{chr(97 + i % 26)}{chr(97 + i // 26)}. " for i in range(600)),
    "one endless quotation": '"' + "One day, Tom met Sam. Tom was glad. " * 500,
    "not English": "Однажды Том встретил Сэма. Том был рад. 汤姆 🐈 " * 200,
    "patterns": "Tom\\b(.*) [a-z]+ Sam$ ^Tom met (Sam. " * 400,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_that_are_not_stories_give_no_items(name: str) -> None:
    text = HOSTILE[name]
    assert len(text) <= MAX_STORY_CHARS
    for find in TASKS.values():
        assert list(find(0, text, WordCounts([text, text]))) == []


def test_texts_longer_than_stories_are_passed_over() -> None:
    for task, find in TASKS.items():
        for n_repeats, n_items in ((100, 24), (MAX_STORY_CHARS // 10, 0)):
            stories = ["It was hot. " * n_repeats + story for story in known_stories()[task]]
            assert len(build_items(find, stories)) == n_items


def test_prepared_data_give_the_items_of_their_validation_stories(sample_data: Path, tokenizer: Tokenizer) -> None:
    tokens, index = open_split(sample_data, "val")
    starts = index[:, 0].astype(int)
    texts = [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]
    assert read_texts(str(sample_data)) == texts
    assert read_texts(str(sample_data), limit=2) == [texts[0], texts[len(texts) // 2]]


def test_too_few_items_are_refused_with_their_number() -> None:
    with pytest.raises(
        UserError, match=r"^2 stories give only 2 items of the task characters, which needs at least 20"
    ):
        build_task("characters", known_stories()["characters"][:2])


@pytest.fixture
def story_file(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl"
    stories = [story for stories in known_stories().values() for story in stories]
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    return path


def test_command_prints_accuracies_and_writes_the_items(
    story_file: Path,
    storyteller: Callable[[IdScore], Storyteller],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Storyteller, "load", lambda *_: storyteller(copy_score))
    items_path = story_file.with_name("items.jsonl")
    command = ["eval", "--data", str(story_file), "--engine", "cpu", "--tasks", "characters,things"]
    assert run(cli, [*command, "--items", str(items_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["characters: 1.000", "things: 1.000"]
    assert run(cli, [*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2
    tasks = json.loads(out)["tasks"]
    assert list(tasks) == ["characters", "things"]
    assert set(tasks["things"]) == {
        *("accuracy", "interval", "sentence_alone", "sentence_alone_interval", "items", "stories", "seconds")
    }
    rows = [json.loads(line) for line in items_path.read_text(encoding="utf-8").splitlines()]
    assert [row["task"] for row in rows] == ["characters"] * tasks["characters"]["items"] + ["things"] * 24
    assert all(row["log_odds"] > 0 for row in rows)
    texts = read_texts(str(story_file))
    assert all(texts[row["story"]].endswith(row["before"] + row["answer"] + row["after"]) for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks plots", "'plots' is not a task; the tasks are characters, things"),
        ("--tasks=", "'' is not a task"),
        ("--items items.jsonl", "--items goes with --tasks"),
        ("--tasks things --items items.txt", "items.txt: the name of a file of items must end in .jsonl"),
        ("--tasks things --items missing/items.jsonl", "folder missing does not exist"),
        ("--tasks things --limit 3", "3 stories give only 0 items of the task things, which needs at least 20"),
        ("--tasks things --text-field story", "story"),
    ],
)
def test_a_mistake_is_one_line(
    options: str, message: str, story_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(story_file.parent)
    monkeypatch.setattr(Storyteller, "load", lambda *_: Storyteller(None, None, None))
    assert run(cli, ["eval", "--data", str(story_file), "--engine", "cpu", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err
