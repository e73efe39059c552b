"""Minimal pairs from stories: sentences that differ in one word, which the story before them decides.

Which of two characters acts, and which of two things is meant. docs/evaluation.md has the rules in words, and examples.
"""

import bisect
import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from tinystories.evaluate.word_lists import NOT_NAMES, NOT_THINGS, PLACES

# A text beyond these limits is not a story. They bound the time that it takes.
MAX_STORY_CHARS = 20_000
MAX_WORDS = 40  # characters, or things

NAME = r"[A-Z][a-z]+"
# White space between two sentences; what precedes it ends the first one.
SENTENCE_BREAK = re.compile(r"(?:(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"”']?|(?=\n))(\s+)")
NAME_INSIDE_SENTENCE = re.compile(rf"(?<=[a-z,] )(?<!Mr\. )(?<!Mrs\. )(?<!Ms\. )(?<!Dr\. )({NAME})\b(?! [A-Z])")
# A character that acts: at the start of a sentence, perhaps after an adverbial, or speaking after a quotation.
SUBJECT = re.compile(
    rf"(?:[A-Z][a-z]+(?: [a-z]+){{0,3}}, |(?:Then|But|So|And|Suddenly|Soon|Now|Finally) )?({NAME})"
    r" (?!(?:and|or|with|the|a|in|to|of|on|at|for|that|who|from)\b)[a-z]+"
)
SPEECH_VERB = "(?:said|says|asked|asks|replied|shouted|cried)"
SPEAKER = re.compile(rf",[\"”] ({NAME}) (?!and\b)[a-z]+|(?:^|[\"”] ){SPEECH_VERB} ({NAME})\b(?! and\b)")
TOGETHER = r"\b(?:[Tt]he(?:y|m|ir)|[Bb]oth|[Tt]ogether|each other)\b"
GIVES_AWAY = re.compile(
    rf"\b(?:[Hh]e|[Ss]he|[Hh]is|[Hh]ers?|[Hh]im|himself|herself|boy|girl|man|woman|brother|sister)\b|{TOGETHER}"
)

# What may follow a noun, so that "the big dog" is not taken for a thing called "big".
AFTER_NOUN = (
    r"(?=[.,!?]| (?:and|in|on|to|was|were|with|at|that|for|is|are|from|into|but|had|because|so|as|again|too|very|by"
    r"|until|when|while|could|would|did|if|or|before|after|back|away|up|down|out|off|over|under|near)\b)"
)
DETERMINER = "(?:the|his|her|their|my|your)"
# Not before a comma, as in "a big, red ball".
NOUN = re.compile(rf"\b(?:[Tt]he|an?|[Hh]is|[Hh]er|[Tt]heir|[Mm]y) ([a-z]{{3,}}){AFTER_NOUN}(?!,)")
NOUN_IN_FRAME = re.compile(rf"\b([A-Za-z]+) {DETERMINER} ([a-z]{{3,}}){AFTER_NOUN}")
# "in his box": (in, box). Other nouns may follow "in", too.
FRAME = re.compile(r"\b([a-z]+) (?:the|an?|his|her|their|my|your|our|its|this|that|some) ([a-z]+)\b")
MIN_FRAME_RATIO = 0.1  # a distractor fits a frame if it is in at least this share of the answer's number of stories
# What is at one place is often at another one, too.
LOCATIVE = frozenset(["around", "at", "behind", "by", "in", "inside", "near", "of", "on", "under"])
JOINED = re.compile(rf"(?:,| and) {DETERMINER} ")
PART_OF = re.compile(r"\b([a-z]+)(?:'s| with| has| had| have| of)\b")  # "a box with a zip"
CHARACTER_VERB = (
    r"said|says|asked|asks|replied|shouted|yelled|cried|laughed|smiled|thought|felt|wanted|wants|liked|loved|looked|saw"
    r"|sees|heard|agreed|nodded|knew|named"
)
MINDFUL_NOUN = re.compile(rf"\b([a-z]+) (?:{CHARACTER_VERB})\b")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A minimal pair: after `context`, the story has `before + answer + after`, not `before + distractor + after`."""

    story: int  # its position in the data, from 0
    context: str  # the story up to the sentence
    before: str  # the sentence up to the word
    answer: str
    distractor: str  # occurs in the context, as does the answer; neither occurs in the rest of the sentence
    after: str  # the rest of the sentence


# An item and its cues: for each of some shallow rules, whether it chooses the answer (1), the distractor (-1) or
# neither (0). The rules: the word mentioned last; the word mentioned more often; for characters, the more common name.
Candidate = tuple[Item, tuple[int, ...]]


class WordCounts:
    """In how many stories each word occurs, and each frame with its noun (`FRAME`)."""

    def __init__(self, stories: Sequence[str]) -> None:
        self.words: collections.Counter[str] = collections.Counter()
        self.frames: collections.Counter[tuple[str, str]] = collections.Counter()
        for story in stories:
            self.words.update(set(re.findall(r"\b[A-Za-z]+\b", story)))
            self.frames.update(set(FRAME.findall(story.lower())))


def build_items(find: "Finder", stories: Sequence[str]) -> list[Item]:
    """Return the items of a task, balanced: each shallow rule is right in as many items as it is wrong.

    The same stories always give the same items, in the order of the stories.
    """
    counts = WordCounts(stories)
    candidates = list[Candidate]()
    for number, story in enumerate(stories):
        if len(story) <= MAX_STORY_CHARS:
            candidates += find(number, story, counts)
    return balance(candidates)


def balance(candidates: Sequence[Candidate]) -> list[Item]:
    """Select as many candidates with some cues as with the opposite cues, evenly spaced among those with the same."""
    by_cues: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for i, (_, cues) in enumerate(candidates):
        by_cues[cues].append(i)
    selected = list[int]()
    for cues, group in by_cues.items():
        n_selected = min(len(group), len(by_cues.get(tuple(-cue for cue in cues), ())))
        selected += (group[i * len(group) // n_selected] for i in range(n_selected))
    return [candidates[i][0] for i in sorted(selected)]


def find_characters(number: int, story: str, counts: WordCounts) -> Iterator[Candidate]:
    """Yield the sentences in which one of two characters acts."""
    names = set(NAME_INSIDE_SENTENCE.findall(story)) - NOT_NAMES
    if not 2 <= len(names) <= MAX_WORDS:
        return
    mentions = Mentions(names, story)
    sentences = list(split_sentences(story))
    for start, stop in sentences:
        span = find_actor(story, start, stop, names)
        if span is None:
            continue
        answer, sentence = story[slice(*span)], story[start : span[0]] + story[span[1] : stop]
        if is_quoted(story, span[0]) or GIVES_AWAY.search(sentence):
            continue
        for distractor in sorted(names):
            if not mentions.is_fair(answer, distractor, start, stop):
                continue
            # Since the last sentence with one of the two, they must not have done something together.
            pair = rf"(?:{answer}|{distractor})"
            last = max(mentions.last(answer, start), mentions.last(distractor, start))
            since = sentences[bisect.bisect_right(sentences, last, key=lambda span: span[0]) - 1][0]
            if not re.search(rf"\b{pair}(?:, | and |, and | with ){pair}\b|{TOGETHER}", story[since:start]):
                prior = sign(counts.words[answer] - counts.words[distractor])
                cues = (*mentions.cues(answer, distractor, start), prior)
                yield make_candidate(number, story, start, span, stop, distractor, cues)


def find_things(number: int, story: str, counts: WordCounts) -> Iterator[Candidate]:
    """Yield the sentences in which one of two things is meant: both objects, or both places."""
    nouns = set(NOUN.findall(story)) - NOT_THINGS - set(MINDFUL_NOUN.findall(story))
    nouns = {noun for noun in nouns if not is_plural(noun)}
    if not 2 <= len(nouns) <= MAX_WORDS:
        return
    mentions = Mentions(nouns, story)
    sentences = list(split_sentences(story))
    parts = {part for start, stop in sentences for part in find_parts(story[start:stop], nouns)}
    frames_here = set(FRAME.findall(story.lower()))

    def count_other_stories(previous: str, noun: str) -> int:
        return counts.frames[previous, noun] - ((previous, noun) in frames_here)

    for start, stop in sentences:
        for match in NOUN_IN_FRAME.finditer(story, start, stop):
            previous, answer, span = match[1].lower(), match[2], match.span(2)
            is_place = answer in PLACES
            if answer not in nouns or previous == "and" or JOINED.match(story, span[1], stop):
                continue
            if is_place and previous in LOCATIVE:
                continue
            # The other word must fit into the sentence, or it would give the answer away.
            min_stories = max(1, MIN_FRAME_RATIO * count_other_stories(previous, answer))
            for distractor in sorted(nouns):
                if (
                    (distractor in PLACES) == is_place
                    and distractor[:4] != answer[:4]
                    and mentions.is_fair(answer, distractor, start, stop)
                    and count_other_stories(previous, distractor) >= min_stories
                    and frozenset((answer, distractor)) not in parts
                ):
                    cues = mentions.cues(answer, distractor, start)
                    yield make_candidate(number, story, start, span, stop, distractor, cues)


Finder = Callable[[int, str, WordCounts], Iterator[Candidate]]
TASKS: dict[str, Finder] = {"characters": find_characters, "things": find_things}


class Mentions:
    """Where some words occur in a story."""

    def __init__(self, words: Iterable[str], story: str) -> None:
        self.positions: dict[str, list[int]] = {word: [] for word in words}
        for match in re.finditer(r"[A-Za-z]+", story):
            if match[0] in self.positions:
                self.positions[match[0]].append(match.start())

    def count(self, word: str, start: int, stop: int) -> int:
        """Return how often the word occurs in story[start:stop]."""
        return bisect.bisect_left(self.positions[word], stop) - bisect.bisect_left(self.positions[word], start)

    def last(self, word: str, stop: int) -> int:
        """Return where the word occurs last before `stop`; -1 if it does not."""
        n_before = bisect.bisect_left(self.positions[word], stop)
        return self.positions[word][n_before - 1] if n_before else -1

    def is_fair(self, answer: str, distractor: str, start: int, stop: int) -> bool:
        """Whether both occur before the sentence story[start:stop], which has the answer once, the distractor never."""
        earlier = self.count(answer, 0, start) and self.count(distractor, 0, start)
        return bool(earlier) and self.count(answer, start, stop) == 1 and not self.count(distractor, start, stop)

    def cues(self, answer: str, distractor: str, start: int) -> tuple[int, int]:
        """Return the cues of recency and frequency for a sentence that begins at `start`."""
        recency = sign(self.last(answer, start) - self.last(distractor, start))
        return recency, sign(self.count(answer, 0, start) - self.count(distractor, 0, start))


def make_candidate(
    number: int, story: str, start: int, span: tuple[int, int], stop: int, distractor: str, cues: tuple[int, ...]
) -> Candidate:
    """Return the item for the word at `span` of the sentence story[start:stop], with its cues."""
    item = Item(
        story=number,
        context=story[:start],
        before=story[start : span[0]],
        answer=story[slice(*span)],
        distractor=distractor,
        after=story[span[1] : stop],
    )
    return item, cues


def split_sentences(story: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each sentence, without the white space around it. A line break ends a sentence."""
    start = 0
    for match in SENTENCE_BREAK.finditer(story):
        yield start, match.start(1)
        start = match.end()
    yield start, len(story)


def find_actor(story: str, start: int, stop: int, names: Collection[str]) -> tuple[int, int] | None:
    """Return where the name of who acts is in the sentence story[start:stop]; None if no character does."""
    for match in (SUBJECT.match(story[start:stop]), SPEAKER.search(story[start:stop])):
        if match is not None and match[match.lastindex or 1] in names:
            first, last = match.span(match.lastindex or 1)
            return start + first, start + last
    return None


def find_parts(sentence: str, nouns: set[str]) -> Iterator[frozenset[str]]:
    """Yield the pairs of nouns of which the sentence says that one has the other."""
    others = nouns.intersection(re.findall(r"[a-z]+", sentence))
    for whole in others.intersection(PART_OF.findall(sentence)):
        yield from (frozenset((whole, other)) for other in others)


def is_quoted(story: str, position: int) -> bool:
    """Whether the position is inside a quotation of its paragraph."""
    paragraph = story[story.rfind("\n", 0, position) + 1 : position]
    return paragraph.count('"') % 2 == 1 or paragraph.count("“") > paragraph.count("”")


def is_plural(noun: str) -> bool:
    """Whether the noun looks like a plural."""
    return noun.endswith("s") and not noun.endswith("ss")


def sign(number: int) -> int:
    """Return -1, 0 or 1."""
    return (number > 0) - (number < 0)
