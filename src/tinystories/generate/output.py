"""Story output: order the text of concurrent stories for display, and write stories to files."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.files import append_text, describe_write_error, write_errors
from tinystories.generate.batching import Story

STORY_SEPARATOR = "\n\n---\n\n"  # between stories on the screen


def reorder(events: Iterable[tuple[int, str | Story]]) -> Iterator[str | Story]:
    """Yield the text of concurrently generated stories as if they were generated one after the other.

    `events` are those of `Storyteller.events`. The first unfinished story streams, the text of later ones is buffered.
    Prompts are not part of the text. Each Story follows when all its text has been yielded.
    """
    current, buffered, finished = 0, dict[int, str](), dict[int, Story]()
    for number, item in events:
        if isinstance(item, Story):
            finished[number] = item
        elif number == current:
            yield item
        else:
            buffered[number] = buffered.get(number, "") + item
        while current in finished:
            yield finished.pop(current)
            current += 1
            if current in buffered:
                yield buffered.pop(current)


def check_output_path(path: Path) -> None:
    """Raise `UserError` if stories cannot be written to this path; call it before generating."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: the name of a story file must end in .txt or .jsonl")
    with write_errors(path):
        is_folder = path.parent.is_dir()
    if not is_folder:
        raise UserError(f"{path} cannot be written: folder {path.parent} does not exist")


class StoryWriter:
    """Context manager that writes stories to a file: .jsonl (one object per line) or .txt (END after each story).

    Nothing is buffered, so that an interrupt does not lose complete stories. Raises `UserError` if the file cannot be
    opened.
    """

    def __init__(self, path: Path) -> None:
        check_output_path(path)
        self.path = path
        try:
            self.file = path.open("wb", buffering=0)  # with a buffer, closing would fail again after a failed write
        except OSError as error:
            raise UserError(describe_write_error(error, path)) from None

    def __enter__(self) -> "StoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, story: Story) -> None:
        """Write one story to the file. `UserError` if the disk refuses it."""
        if self.path.suffix == ".jsonl":
            text = json.dumps(story.as_dict(), ensure_ascii=False) + "\n"
        else:
            text = f"{story.text}\n{END}\n"
        append_text(self.file, text, self.path, "the stories before this one are complete")
