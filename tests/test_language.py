"""Source, docs and README use the field's standard terms and American spelling (the table is in CONTRIBUTING.md)."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "src").rglob("*.py")),
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"),
    ROOT / "README.md",
]
# Matched in prose: comments and string literals of Python files, whole lines of Markdown. "There is no X" is idiomatic,
# "it is no X" is not.
PHRASES = re.compile(
    r"\b(?:but for|(?<!there )is no (?!longer\b)|anew|at hand|so many|mend(?:s|ed|ing)?|for ever|while it lasts)\b"
    r"|\b(?:de|re)?(?:tokenis|quantis|normalis|optimis|minimis|maximis|initialis|serialis|recognis|summaris|organis)"
    r"|\b(?:colour|licence|behaviour|neighbour|favour)",
    re.IGNORECASE,
)
# Refused as the name of anything that Python code defines or uses.
VAGUE_NAMES = {"teller", "found", "told"}
BRITISH_NAME = re.compile(r"tokenis|quantis|normalis|optimis|colour|licence|behaviour|neighbour", re.IGNORECASE)
# Text that exports write into files, whose bytes stay: see tests/golden.
EXPORTED_TEXT = {("src/tinystories/hub/card.py", "licence")}


def bad_phrases(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(line, phrase) for each refused phrase in numbered lines of prose."""
    for number, line in lines:
        # Link targets, file names and code in backticks keep their spelling.
        prose = re.sub(r"\]\([^)]*\)|\S+\.md\b|`[^`]*`", "", line)
        yield from ((number, match.group().strip()) for match in PHRASES.finditer(prose))


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and string literals of a Python file."""
    strings = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in strings:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def bad_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each refused identifier: variables, attributes, parameters, keywords, functions and classes."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and (name in VAGUE_NAMES or BRITISH_NAME.search(name)):
                yield getattr(node, "lineno", 0), name


def bad_words(path: Path, text: str) -> list[str]:
    """Every hit in a file as `file:line: words`."""
    if path.suffix == ".py":
        hits = [*bad_phrases(python_prose(text)), *bad_names(text)]
    else:
        hits = list(bad_phrases(enumerate(text.splitlines(), 1)))
    return [
        f"{path}:{line}: {words!r}" for line, words in sorted(hits) if (path.as_posix(), words) not in EXPORTED_TEXT
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_uses_standard_terms_and_american_spelling(path: Path) -> None:
    hits = bad_words(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    assert not hits, "see the table in CONTRIBUTING.md:\n" + "\n".join(hits)


@pytest.mark.parametrize(
    ("name", "text", "hits"),
    [
        ("a.md", "All of them but for one.\n", ["a.md:1: 'but for'"]),
        ("a.md", "x\nIt is no cure; there is no cure at hand.\n", ["a.md:2: 'at hand'", "a.md:2: 'is no'"]),
        ("a.md", "A quantised tokeniser.\n", ["a.md:1: 'quantis'", "a.md:1: 'tokenis'"]),
        ("a.md", "It is no longer [here](decisions/0002-tokenisers.md), `colour` amends it.\n", []),
        ("a.py", '"""Doc.\n\nSo many words.\n"""\n', ["a.py:3: 'So many'"]),
        ("a.py", "x = 1  # mend it\n", ["a.py:1: 'mend'"]),
        ("a.py", "x = f'{1} of so many'\n", ["a.py:1: 'so many'"]),
        ("a.py", "found = 1\n", ["a.py:1: 'found'"]),
        ("a.py", "def f(*, told): ...\n", ["a.py:1: 'told'"]),
        ("a.py", "f(colour=x.teller)\n", ["a.py:1: 'colour'", "a.py:1: 'teller'"]),
        ("a.py", "x = 'not found'  # told\n", []),
    ],
    ids=str,
)
def test_rule_reports_planted_words_by_file_and_line(name: str, text: str, hits: list[str]) -> None:
    assert bad_words(Path(name), text) == hits
