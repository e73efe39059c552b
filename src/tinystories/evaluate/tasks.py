"""Tasks that measure whether a model keeps the thread of a story (docs/evaluation.md). Does not require torch."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinystories.data.dataset import open_split
from tinystories.data.source.reader import DecodeErrors
from tinystories.data.source.resolve import iter_stories
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine
from tinystories.engine.sliding_window import sliding_window_logprobs
from tinystories.errors import UserError
from tinystories.evaluate.bits import bootstrap_interval, read_prepared_stories
from tinystories.evaluate.items import TASKS, Item, build_items
from tinystories.files import write_atomic, write_errors
from tinystories.generate.storyteller import Storyteller

BATCH_ITEMS = 128  # items scored together: four sequences each
MIN_ITEMS = 20  # the 95% interval of fewer is wider than 0.4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskReport:
    """The result of one task. Accuracy is the share of items in which the answer is more likely; ties count half."""

    accuracy: float
    interval: tuple[float, float]  # 95% interval of the accuracy, by bootstrap over the stories
    sentence_alone: float  # accuracy without the story before the sentence: near 0.5 if the task is fair
    sentence_alone_interval: tuple[float, float]
    items: int
    stories: int  # those with items
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ItemScores:
    """For each item, by how many nats the sentence with the answer is more likely than that with the distractor."""

    in_story: npt.NDArray[np.float64]
    sentence_alone: npt.NDArray[np.float64]


def read_texts(data: str, *, text_field: str = "text", errors: DecodeErrors = "strict", limit: int = 0) -> list[str]:
    """Return the stories of `data`: story files, a named source, or the validation split of a prepared folder.

    `limit` > 0: only the first ones of files and sources, evenly spaced ones of a prepared folder.
    """
    if (Path(data) / "meta.json").is_file():
        tokenizer = Tokenizer.load(data)
        stories = read_prepared_stories(*open_split(data, "val"), limit)
        return [tokenizer.decode([int(token) for token in ids[1:-1]]) for ids, _ in stories]
    return list(itertools.islice(iter_stories(data, text_field=text_field, errors=errors, split="val"), limit or None))


def build_task(task: str, texts: Sequence[str]) -> list[Item]:
    """Return the items of a task, one of `TASKS`. Raises `UserError` if there are fewer than `MIN_ITEMS`."""
    items = build_items(TASKS[task], texts)
    if len(items) < MIN_ITEMS:
        raise UserError(
            f"{len(texts):,} stories give only {len(items)} items of the task {task}, which needs at least {MIN_ITEMS};"
            " pass more stories"
        )
    return items


def evaluate_task(
    storyteller: Storyteller, items: Sequence[Item], progress: Callable[[int], None] | None = None
) -> tuple[TaskReport, ItemScores]:
    """Score the items of one task. `progress` is called with the number of items scored so far."""
    started_at = time.perf_counter()
    scores = score_items(storyteller.engine, storyteller.tokenizer, items, progress)
    return summarize_task(items, scores, time.perf_counter() - started_at), scores


def score_items(
    engine: Engine, tokenizer: Tokenizer, items: Sequence[Item], progress: Callable[[int], None] | None = None
) -> ItemScores:
    """Score items in batches. Raises `UserError` if a probability is not finite."""
    in_story, sentence_alone = [np.empty(0)], [np.empty(0)]
    for first in range(0, len(items), BATCH_ITEMS):
        batch = items[first : first + BATCH_ITEMS]
        in_story.append(compare(engine, tokenizer, [(item.context + item.before, item) for item in batch]))
        sentence_alone.append(compare(engine, tokenizer, [(item.before, item) for item in batch]))
        if progress is not None:
            progress(first + len(batch))
    return ItemScores(in_story=np.concatenate(in_story), sentence_alone=np.concatenate(sentence_alone))


def compare(engine: Engine, tokenizer: Tokenizer, items: Sequence[tuple[str, Item]]) -> npt.NDArray[np.float64]:
    """Return the log-odds (nats) of the answer in each item, given the text before it.

    Both texts are tokenized whole and scored after END. What differs is the log-probability from the first token that
    is not the same in both, to the end of the sentence.
    """
    texts = [prefix + word + item.after for prefix, item in items for word in (item.answer, item.distractor)]
    sequences = [[tokenizer.end_id, *ids] for ids in tokenizer.encode_batch(texts)]
    pairs = list(zip(sequences[::2], sequences[1::2], strict=True))
    totals = np.zeros((len(pairs), 2))
    # A tokenizer without the two words may encode both alike: a tie.
    different = [i for i, (a, b) in enumerate(pairs) if a != b]
    logprobs = sliding_window_logprobs(engine, [ids for i in different for ids in pairs[i]])
    for n, i in enumerate(different):
        n_same = next(k for k, (a, b) in enumerate(itertools.zip_longest(*pairs[i])) if a != b)
        # logprobs[k] belongs to the id at k + 1.
        totals[i] = [logprob[n_same - 1 :].sum() for logprob in logprobs[2 * n : 2 * n + 2]]
    if not np.isfinite(totals).all():
        raise UserError("the model's probabilities are not finite; its weights are damaged: use another checkpoint")
    return totals[:, 0] - totals[:, 1]


def summarize_task(items: Sequence[Item], scores: ItemScores, seconds: float) -> TaskReport:
    """Aggregate the scores of the items."""
    _, story_of_item = np.unique([item.story for item in items], return_inverse=True)
    n_items = np.bincount(story_of_item)
    accuracies, intervals = [], []
    for log_odds in (scores.in_story, scores.sentence_alone):
        n_right = np.bincount(story_of_item, weights=(np.sign(log_odds) + 1) / 2).astype(np.float64)
        accuracies.append(float(n_right.sum() / len(items)))
        intervals.append(bootstrap_interval(n_right, n_items))
    return TaskReport(
        accuracy=accuracies[0],
        interval=intervals[0],
        sentence_alone=accuracies[1],
        sentence_alone_interval=intervals[1],
        items=len(items),
        stories=len(n_items),
        seconds=seconds,
    )


def check_items_path(path: Path) -> None:
    """Raise `UserError` if items cannot be written to this path; call it before scoring."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: the name of a file of items must end in .jsonl")
    with write_errors(path):
        is_folder = path.parent.is_dir()
    if not is_folder:
        raise UserError(f"{path} cannot be written: folder {path.parent} does not exist")


def write_items(path: Path, items: Mapping[str, Sequence[Item]], scores: Mapping[str, ItemScores]) -> None:
    """Write the items of each task with their scores, one JSON object per line."""
    rows = [
        {"task": task, **dataclasses.asdict(item), "log_odds": in_story, "log_odds_sentence_alone": alone}
        for task in items
        for item, in_story, alone in zip(
            items[task], scores[task].in_story.tolist(), scores[task].sentence_alone.tolist(), strict=True
        )
    ]
    with write_errors(path):
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
