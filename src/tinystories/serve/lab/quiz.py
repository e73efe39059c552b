"""Which of two? A quiz for readers: sentences from the bundled stories in which a character or a thing is missing.

The items are those of `evaluate.tasks`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine
from tinystories.evaluate.items import TASKS, Item, build_items
from tinystories.evaluate.tasks import read_texts, score_items

# (task, story): those of the bundled stories that are clear to readers, chosen by hand.
CHOSEN = (
    ("characters", 167),
    ("things", 41),
    ("characters", 154),
    ("characters", 50),
    ("things", 137),
    ("characters", 3),
    ("characters", 97),
    ("things", 160),
    ("characters", 163),
    ("characters", 107),
    ("things", 23),
    ("characters", 143),
    ("characters", 8),
    ("things", 129),
    ("characters", 147),
    ("characters", 60),
    ("things", 70),
    ("characters", 164),
    ("characters", 117),
    ("things", 104),
)
CONTEXT_CHARS = range(120, 900)  # long enough to decide, short enough to read


def build_quiz() -> list[tuple[str, Item]]:
    """Return (task, item) of each question, always the same ones: the first good item of each story in `CHOSEN`."""
    texts = read_texts("sample")
    items: dict[tuple[str, int], Item] = {}
    for task, find in TASKS.items():
        for item in build_items(find, texts):
            if len(item.context) in CONTEXT_CHARS:
                items.setdefault((task, item.story), item)
    return [(task, items[task, story]) for task, story in CHOSEN]


def list_items(items: Sequence[tuple[str, Item]]) -> list[dict[str, Any]]:
    """Return the questions, without their answers: the two words are in alphabetical order."""
    return [
        {
            "task": task,
            "context": item.context,
            "before": item.before,
            "after": item.after,
            "words": sorted((item.answer, item.distractor)),
        }
        for task, item in items
    ]


def answer_item(engine: Engine, tokenizer: Tokenizer, item: Item) -> dict[str, Any]:
    """Return what the story says and what the model finds likelier, after the whole story and after nothing.

    `log_odds` are nats, as of `evaluate.tasks.score_items`; `prob` is the model's probability of the answer if only
    the two words were possible.
    """
    scores = score_items(engine, tokenizer, [item])
    in_story, alone = float(scores.in_story[0]), float(scores.sentence_alone[0])
    return dataclasses.asdict(item) | {
        "log_odds": round(in_story, 4),
        "prob": round(to_prob(in_story), 4),
        "prob_alone": round(to_prob(alone), 4),
        "is_model_right": in_story > 0,
    }


def to_prob(log_odds: float) -> float:
    """Return the probability with these log-odds (nats)."""
    return 0.5 * (1 + math.tanh(log_odds / 2))
