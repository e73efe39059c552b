"""Writes story_endings.jsonl: each bundled story without its last paragraph, and four endings, one of them its own.

The others are those of the stories whose last paragraphs are nearest in length; the right one stands at 0, 1, 2 or 3 in
turn.

    python benchmarks/endings/make.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinystories.data.source.resolve import iter_stories

OUT = Path(__file__).with_name("story_endings.jsonl")
N_CHOICES = 4


def main() -> None:
    OUT.write_text("".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks()), encoding="utf-8")


def tasks() -> Iterator[dict[str, Any]]:
    """{"beginning", "endings", "label"} of each story; an ending begins with the space that parts it from before."""
    parts = [story.rsplit("\n\n", 1) for story in iter_stories("sample")]
    for number, (beginning, own) in enumerate(parts):
        others = [(abs(len(other) - len(own)), i) for i, (_, other) in enumerate(parts) if i != number]
        endings = [parts[i][1] for _, i in sorted(others)[: N_CHOICES - 1]]
        endings.insert(number % N_CHOICES, own)
        yield {"beginning": beginning, "endings": [f"\n\n{text}" for text in endings], "label": number % N_CHOICES}


if __name__ == "__main__":
    main()
