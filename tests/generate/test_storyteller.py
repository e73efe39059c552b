import concurrent.futures
import dataclasses
import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinystories.cli.write.generate import print_stories
from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.generate.batching import Request, Story
from tinystories.generate.output import STORY_SEPARATOR
from tinystories.generate.storyteller import Storyteller

DEFAULTS = SamplingConfig(temperature=0.9, top_k=50, min_p=0.0)


@pytest.fixture
def teller(chaotic: Callable[..., Any], tokenizer: Tokenizer) -> Storyteller:
    return Storyteller(chaotic(end=0.1, n_slots=3), tokenizer, DEFAULTS)


def test_generate_tells_one_story_or_a_list(teller: Storyteller) -> None:
    one = teller.generate("The", seed=5, max_tokens=20)
    many = teller.generate("The", seed=5, max_tokens=20, num=4)
    assert [story.number for story in many] == [0, 1, 2, 3]
    assert many[0].ids == one.ids
    assert len({story.ids for story in many}) == 4
    assert len(teller.generate("The", seed=5, num=1)) == 1


def test_stream_gives_the_text_of_generate(teller: Storyteller) -> None:
    story = teller.generate("The", seed=5, max_tokens=40, stop="cat")
    assert "".join(teller.stream("The", seed=5, max_tokens=40, stop="cat")) == story.continuation


def test_a_story_without_a_seed_gets_a_random_one_and_can_be_repeated(
    teller: Storyteller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 2**bits - 1)
    one = teller.generate(max_tokens=20)
    assert one.seed == 2**32 - 1
    assert teller.generate(max_tokens=20, seed=one.seed).ids == one.ids


def test_options_are_laid_over_the_models_own(teller: Storyteller) -> None:
    request = teller.build_request("The", {"top_k": 3, "stop": ["x"], "max_tokens": 7, "seed": 1})
    assert request == Request(
        prompt="The", settings=dataclasses.replace(DEFAULTS, top_k=3), max_tokens=7, seed=1, stop=("x",)
    )
    nothing = teller.build_request("", {"temperature": None, "seed": 1})  # type: ignore[typeddict-item]
    assert nothing.settings == DEFAULTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "did you mean temperature"),
        ({"zzz": 1}, "unknown option zzz"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"num": 0}, "num=0"),
        ({"stop": ""}, "stop string"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(teller: Storyteller, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        teller.generate("The", **options)


def test_a_stream_complains_at_once_not_at_its_first_piece(teller: Storyteller) -> None:
    with pytest.raises(UserError, match="max_tokens"):
        teller.stream("The", max_tokens=0)


def test_an_open_stream_cannot_be_mixed_up_with_another_story(teller: Storyteller) -> None:
    alone = "".join(teller.stream("The", seed=1, max_tokens=30))
    pieces = teller.stream("The", seed=1, max_tokens=30)
    text = next(pieces)
    with pytest.raises(UserError, match="still open"):
        teller.generate("The")
    with pytest.raises(UserError, match="still open"):
        next(teller.stream("The"))
    assert text + "".join(pieces) == alone
    teller.generate("The")


def test_closing_a_stream_frees_the_engine(teller: Storyteller) -> None:
    pieces = teller.stream("The", seed=1)
    next(pieces)
    pieces.close()
    assert teller.engine.content == {}  # type: ignore[attr-defined]
    teller.generate("The")


def requests(teller: Storyteller, num: int) -> list[Request]:
    first = teller.build_request("The", {"seed": 5, "max_tokens": 20})
    return [dataclasses.replace(first, number=number) for number in range(num)]


def test_events_give_the_stories_of_generate_and_their_text(teller: Storyteller) -> None:
    events = list(teller.events(requests(teller, 4)))
    stories = {index: item for index, item in events if isinstance(item, Story)}
    texts = {i: "".join(item for index, item in events if index == i and isinstance(item, str)) for i in range(4)}
    expected = teller.generate("The", seed=5, max_tokens=20, num=4)
    assert [stories[i].ids for i in range(4)] == [story.ids for story in expected]
    assert [texts[i] for i in range(4)] == [story.continuation for story in expected]


def test_open_events_refuse_a_call_of_another_thread_and_go_on(teller: Storyteller) -> None:
    expected = [(i, item) for i, item in teller.events(requests(teller, 4)) if isinstance(item, str)]
    events = teller.events(requests(teller, 4))
    head = [next(events)]
    calls: list[Callable[[], object]] = [
        lambda: teller.generate("The"),
        lambda: next(teller.stream("The")),
        lambda: next(teller.events(requests(teller, 2))),
    ]
    with concurrent.futures.ThreadPoolExecutor(1) as other_thread:
        for call in calls:
            with pytest.raises(UserError, match="still open"):
                other_thread.submit(call).result()
    assert [(i, item) for i, item in [*head, *events] if isinstance(item, str)] == expected
    teller.generate("The", max_tokens=3)


def test_events_reserve_the_storyteller_from_the_first_item_on(teller: Storyteller) -> None:
    events = teller.events(requests(teller, 2))
    teller.generate("The", max_tokens=3)
    next(events)
    with pytest.raises(UserError, match="still open"):
        teller.generate("The")
    events.close()


@pytest.mark.parametrize("name", ["events", "stream"])
def test_a_dropped_iterator_frees_slots_and_lock(teller: Storyteller, name: str) -> None:
    iterator: Iterator[object] = (
        teller.stream("The", seed=1) if name == "stream" else teller.events(requests(teller, 4))
    )
    next(iterator)
    assert teller.engine.content  # type: ignore[attr-defined]
    del iterator
    gc.collect()
    assert teller.engine.content == {}  # type: ignore[attr-defined]
    teller.generate("The", max_tokens=3)


def test_an_interrupt_frees_slots_and_lock(teller: Storyteller, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teller.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teller.generate("The", seed=1, num=4)
    assert teller.engine.content == {}  # type: ignore[attr-defined]
    teller.generate("The", max_tokens=3)


@pytest.mark.parametrize("stream", [True, False])
def test_the_command_prints_the_stories_of_generate(
    teller: Storyteller, capsys: pytest.CaptureFixture[str], tmp_path: Path, stream: bool
) -> None:
    out = tmp_path / "stories.jsonl"
    print_stories(teller, requests(teller, 1)[0], 4, stream=stream, out=out)
    stories = teller.generate("The", seed=5, max_tokens=20, num=4)
    assert capsys.readouterr().out == STORY_SEPARATOR.join(story.text for story in stories) + "\n"
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["ids"] for line in written] == [list(story.ids) for story in stories]


def test_the_command_reserves_the_storyteller(teller: Storyteller) -> None:
    events = teller.events(requests(teller, 2))
    next(events)
    with pytest.raises(UserError, match="still open"):
        print_stories(teller, requests(teller, 1)[0], 1, stream=True, out=None)
    events.close()


def test_score_gives_each_token_and_the_end(teller: Storyteller, tokenizer: Tokenizer) -> None:
    text = "The cat sat on a mat and was happy."
    scores = teller.score(text)
    ids = tokenizer.encode(text)
    assert [score.id for score in scores] == [*ids, tokenizer.end_id]
    assert "".join(score.text for score in scores[:-1]) == text
    assert scores[-1].text == END
    assert all(math.isfinite(score.logprob) and score.logprob < 0 for score in scores)
    prefix = [tokenizer.end_id, *ids]
    for n in (0, 3):  # by hand, where everything fits the context
        z = teller.engine.rule(prefix[: n + 1]).astype("float64")  # type: ignore[attr-defined]
        assert scores[n].logprob == pytest.approx(z[prefix[n + 1]] - math.log(sum(map(math.exp, z))))


def test_score_of_nothing_is_that_of_the_end(teller: Storyteller) -> None:
    (score,) = teller.score("")
    assert score.text == END


def test_score_shows_parts_of_characters_as_such(teller: Storyteller, tokenizer: Tokenizer) -> None:
    scores = teller.score("日")
    assert len(scores) == len(tokenizer.encode("日")) + 1
    assert all(score.text == "\ufffd" for score in scores[:-1])


def test_score_refuses_what_is_no_text(teller: Storyteller) -> None:
    with pytest.raises(UserError, match="character 1"):
        teller.score("a\ud800")
