"""Resolve source names to sources: known collections, Hub datasets, files."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from tinystories.data.source.files import READERS, FileSource, find_story_files
from tinystories.data.source.hub import HubSource, parse_hub_name
from tinystories.data.source.pipe import PipeCopy, copy_pipe, is_pipe
from tinystories.data.source.reader import DecodeErrors, ReadOptions
from tinystories.errors import UserError, quoted

SAMPLE_PATH = Path(__file__).parents[1] / "sample" / "stories.txt"


Source = FileSource | HubSource
SourceNames = str | Path | Sequence[str | Path]


def get_named_sources() -> dict[str, Source]:
    """Return the known collections by name. Rows 0 to 9,999 of tinystories-clean are its test set and not used."""
    v2_files = {
        split: f"TinyStoriesV2-GPT4-{file}.txt" for split, file in (("train", "train"), ("validation", "valid"))
    }
    sources: tuple[Source, ...] = (
        FileSource("sample", (SAMPLE_PATH,), val_fraction=0.1),
        HubSource(name="tinystories", repo="roneneldan/TinyStories"),
        HubSource(name="tinystories-v2", repo="roneneldan/TinyStories", data_files=v2_files),
        HubSource(
            name="tinystories-clean",
            repo="karpathy/tinystories-gpt4-clean",
            rows=(20_000, None),
            val_rows=(10_000, 20_000),
        ),
    )
    return {source.name: source for source in sources}


def resolve_source(source: SourceNames) -> Source:
    """Return the source for a known name, hf:OWNER/NAME[@REVISION], or one or more files, folders or pipes.

    Does not access the network. A pipe is read to its end. Raises `UserError` if the name is unknown or a file is
    missing, empty or unsupported.
    """
    names = [source] if isinstance(source, str | bytes | Path) or not isinstance(source, Iterable) else list(source)
    named = get_named_sources()
    if len(names) == 1 and (name := str(names[0])) in named:
        return named[name]
    if len(names) == 1 and (name := str(names[0])).startswith("hf:"):
        repo, revision = parse_hub_name(name)
        return HubSource(name=name, repo=repo, revision=revision)
    for item in names:
        if not isinstance(item, str | Path):
            raise UserError(f"a source is a name or a path, not {type(item).__name__}: {quoted(item)}")
    paths, copies = list[Path](), list[PipeCopy]()
    for path in map(Path, names):
        if is_pipe(path):
            copies.append(copy_pipe(path, tuple(READERS)))
            paths.append(copies[-1].path)
        else:
            paths += find_story_files(path, named)
    return FileSource(" ".join(map(str, names)), tuple(paths), copies=tuple(copies))


def iter_stories(
    source: SourceNames,
    *,
    split: Literal["train", "val"] = "train",
    text_field: str = "text",
    errors: DecodeErrors = "strict",
) -> Iterator[str]:
    """Yield every non-empty story of a source in order, stripped and with `\\n` newlines.

    `split` selects the split of a Hub source that has its own validation split. Other sources, such as files, are read
    completely for either value.
    """
    resolved = resolve_source(source).pin_revision()
    if split == "val":
        resolved = resolved.get_validation_split() or resolved
    for batch in resolved.read_batches(ReadOptions(text_field, errors)):
        for story in batch.stories:
            yield story.decode()
