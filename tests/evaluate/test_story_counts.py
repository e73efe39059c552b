"""What is counted in stories, on stories where one can count by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_statistics import (
    COPY_NGRAM,
    NgramIndex,
    extract_names,
    has_loop,
    measure_diversity,
    split_words,
)

CAT = "One day Lily saw a cat. She said to Tom, “It’s a big cat!” Then Lily and Tom ran."


def test_words_have_no_case_and_no_punctuation() -> None:
    assert split_words("“It’s Tom's cat,” said Lily... 3 cats!") == [
        "it’s",
        "tom's",
        "cat",
        "said",
        "lily",
        "3",
        "cats",
    ]


def test_names_stand_within_sentences() -> None:
    assert extract_names(CAT) == {"Lily", "Tom"}
    assert extract_names("She ran. The dog sat. It was big.") == set()


@pytest.mark.parametrize(("times", "expected"), [(2, False), (3, True)])
def test_a_loop_is_six_words_three_times(times: int, expected: bool) -> None:
    again = "he ran to the big tree "
    assert has_loop(again * times + "and slept") == expected
    assert not has_loop(" ".join(f"he ran to the tree{i}" for i in range(9)))  # five words only


def test_copies_are_counted_in_runs_of_thirteen_words() -> None:
    story = " ".join(f"w{i}" for i in range(40))
    other = " ".join(f"v{i}" for i in range(40))
    seen = NgramIndex([story, "too short"])
    assert seen.copied_fraction([story.upper()]) == 1
    assert seen.copied_fraction([other]) == 0
    half = " ".join([*story.split()[:20], *other.split()[:20]])  # 8 of 28 runs lie in the first half
    assert seen.copied_fraction([half]) == pytest.approx((20 - COPY_NGRAM + 1) / (40 - COPY_NGRAM + 1))
    assert seen.copied_fraction(["too short"]) == 0
    assert NgramIndex([]).copied_fraction([story]) == 0


def test_variety_of_the_same_story_twice() -> None:
    once, twice = measure_diversity([CAT]), measure_diversity([CAT, CAT])
    assert (once.stories, once.words, once.looping, once.names) == (1, 19, 0, 2)
    assert (once.distinct_openings, once.distinct_trigrams, once.commonest_name) == (1, 1, 1)
    assert (twice.distinct_openings, twice.distinct_trigrams, twice.names) == (0.5, 0.5, 2)


def test_a_name_that_comes_late_is_counted() -> None:
    faithful = "Once there was a girl named Lily. She had a dog. One day, Lily ran. The dog saw Lily and was glad."
    assert measure_diversity([faithful]).late_names == 0
    assert measure_diversity([faithful.replace("saw Lily", "saw Mia")]).late_names == 0.5
    assert measure_diversity(["a cat sat."]).late_names == 0


@given(st.lists(st.text(), min_size=1))
def test_any_text_can_be_counted(texts: list[str]) -> None:
    found = measure_diversity(texts)
    for share in (
        found.looping,
        found.distinct_openings,
        found.commonest_name,
        found.late_names,
        found.distinct_trigrams,
    ):
        assert 0 <= share <= 1
    assert 0 <= NgramIndex(texts).copied_fraction(texts) <= 1
