"""Stories on their way out: in order to a reader, one by one to a file."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from tinystories.data.tokenizer import END
from tinystories.errors import UserError
from tinystories.generate.batching import Story

STORY_SEPARATOR = "\n\n---\n\n"  # between stories on the screen


def reorder(events: Iterable[tuple[int, str | Story]], on_story: Callable[[Story], None]) -> Iterator[str]:
    """Text of stories that are told side by side, as if they were told one after the other.

    The first unfinished story streams; those behind it wait their turn. Each piece begins with the prompt where a
    story does. `told` gets each Story, in order.
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
            on_story(finished.pop(current))
            current += 1
            if current in buffered:
                yield buffered.pop(current)


def check_output_path(path: Path) -> None:
    """`UserError` where stories cannot be kept, before there are any."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: the name of a file for stories must end in .txt or .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}")


class StoryWriter:
    """`with StoryFile(path) as file: file.write(story)`; .jsonl (one object a line) or .txt (END after each story).

    Every story is on the disk when `write` returns, so that an interrupt loses none that was whole.
    """

    def __init__(self, path: Path) -> None:
        check_output_path(path)
        self.path = path
        try:
            self.file = path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def __enter__(self) -> "StoryWriter":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def write(self, story: Story) -> None:
        if self.path.suffix == ".jsonl":
            self.file.write(json.dumps(story.as_dict(), ensure_ascii=False) + "\n")
        else:
            self.file.write(f"{story.text}\n{END}\n")
        self.file.flush()
