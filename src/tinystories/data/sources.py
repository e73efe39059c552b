"""Where stories come from, by name: known collections, the Hub, files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tinystories.data.files import FileSource, story_files
from tinystories.data.hub import HubSource, repository
from tinystories.data.reader import Errors, ReadOptions

SAMPLE = Path(__file__).parent / "sample" / "stories.txt"


Source = FileSource | HubSource
Names = str | Path | Sequence[str | Path]


def named_sources() -> dict[str, Source]:
    """The collections known by a name. Rows 0 to 9,999 of tinystories-clean are its test set, unused here."""
    v2 = {split: f"TinyStoriesV2-GPT4-{file}.txt" for split, file in (("train", "train"), ("validation", "valid"))}
    sources: tuple[Source, ...] = (
        FileSource("sample", (SAMPLE,), held_out=0.1),
        HubSource(name="tinystories", repo="roneneldan/TinyStories"),
        HubSource(name="tinystories-v2", repo="roneneldan/TinyStories", data_files=v2),
        HubSource(
            name="tinystories-clean",
            repo="karpathy/tinystories-gpt4-clean",
            rows=(20_000, None),
            val_rows=(10_000, 20_000),
        ),
    )
    return {source.name: source for source in sources}


def resolve(source: Names) -> Source:
    """The source of that name (`design.md`: a known name, hf:OWNER/NAME[@REVISION], or files); touches no network."""
    names = [source] if isinstance(source, str | Path) else list(source)
    known = named_sources()
    if len(names) == 1 and (name := str(names[0])) in known:
        return known[name]
    if len(names) == 1 and (name := str(names[0])).startswith("hf:"):
        repo, revision = repository(name)
        return HubSource(name=name, repo=repo, revision=revision)
    paths = tuple(path for name in names for path in story_files(Path(name), known))
    return FileSource(" ".join(map(str, names)), paths)


def stories(
    source: Names,
    *,
    split: Literal["train", "val"] = "train",
    text_field: str = "text",
    errors: Errors = "strict",
) -> Iterator[str]:
    """Every story of a source in order: stripped, with plain newlines, empty ones left out.

    `split` chooses between those that a Hub source has itself; files are read whole for either.
    """
    chosen = resolve(source).pinned()
    if split == "val":
        chosen = chosen.validation() or chosen
    for batch in chosen.batches(ReadOptions(text_field, errors)):
        for story in batch.stories:
            yield story.decode()
