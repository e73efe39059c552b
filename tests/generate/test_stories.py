import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinystories.config import SamplingConfig
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.generate import sampling
from tinystories.generate.batching import Request, Story, generate_all, stream_all
from tinystories.generate.detokenizer import CONTINUATION_SEPARATOR

Make = Callable[..., Any]
WILD = SamplingConfig(temperature=1.0, min_p=0.0)
GREEDY = SamplingConfig(temperature=0.0)


def generate(engine: Any, tokenizer: Tokenizer, prompt: str = "", **options: Any) -> Story:
    return generate_all(engine, tokenizer, [Request(prompt=prompt, **options)])[0]


def test_a_story_says_how_it_was_made(scripted: Make, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" cat sat.")
    story = generate(scripted(ids), tokenizer, "The", settings=GREEDY, seed=9, max_tokens=50)
    assert story.text == "The cat sat."
    assert story.continuation == " cat sat."
    assert story.ids == (*ids, tokenizer.end_id)
    assert (story.stop_reason, story.seed, story.number) == ("end", 9, 0)
    assert (story.n_prompt, story.n_generated) == (len(tokenizer.encode("The")), len(ids) + 1)
    assert story.seconds > 0
    assert story.tokens_per_s == pytest.approx(story.n_generated / story.seconds)


def test_any_special_token_ends_a_story_and_so_does_an_id_without_text(scripted: Make, tokenizer: Tokenizer) -> None:
    parts = json.loads(tokenizer.json_text)
    last = tokenizer.vocab_size
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": last, "content": "</s>"})
    other = Tokenizer(json.dumps(parts))
    assert other.encode("</s>") == tokenizer.encode("</s>")
    for closing in (last, last + 5):
        engine = scripted([*tokenizer.encode(" cat"), closing, *tokenizer.encode(" dog")], n_ids=last + 6)
        story = generate(engine, other, "The", settings=GREEDY, seed=1)
        assert (story.text, story.stop_reason) == ("The cat", "end")


def test_a_story_is_plain_json(scripted: Make, tokenizer: Tokenizer) -> None:
    story = generate(scripted(tokenizer.encode(" cat")), tokenizer, "The", settings=GREEDY)
    plain = json.loads(json.dumps(story.as_dict()))
    assert plain["text"] == "The cat"
    assert plain["n_generated"] == len(plain["ids"])
    assert plain.keys() >= {field.name for field in dataclasses.fields(Story)}


def test_the_engine_reads_the_end_token_then_the_prompt(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0)
    events = stream_all(engine, tokenizer, [Request(prompt="The cat", settings=WILD, max_tokens=3)])
    next(events)
    assert engine.content[0][: len(tokenizer.encode("The cat")) + 1] == [
        tokenizer.end_id,
        *tokenizer.encode("The cat"),
    ]
    events.close()
    empty = stream_all(engine, tokenizer, [Request(settings=WILD)])
    next(empty)
    assert engine.content[0][0] == tokenizer.end_id
    empty.close()


def test_max_tokens_is_exact(chaotic: Make, tokenizer: Tokenizer) -> None:
    for n in (1, 2, 40):
        story = generate(chaotic(end=0), tokenizer, "The", settings=WILD, max_tokens=n)
        assert (story.n_generated, story.stop_reason) == (n, "length")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 20), st.lists(st.integers(0, 3), min_size=1, max_size=9), st.randoms())
def test_a_story_does_not_depend_on_its_neighbours(
    chaotic: Make, tokenizer: Tokenizer, n_slots: int, n_ctx: int, numbers: list[int], random: Any
) -> None:
    """Whatever runs beside it, with whatever settings, in however many slots, in any order."""
    requests = [
        Request(
            prompt=random.choice(["", "The", "Once upon a time there was"]),
            settings=random.choice([WILD, GREEDY, SamplingConfig(top_k=5, repetition_penalty=1.5)]),
            max_tokens=random.randint(1, 12),
            seed=random.randint(0, 2),
            number=number,
            stop=random.choice([(), ("a",), ("sat", "e")]),
            ignore_end=random.random() < 0.3,
        )
        for number in numbers
    ]
    engine = chaotic(end=0.1, n_slots=n_slots, n_ctx=n_ctx)
    together = generate_all(engine, tokenizer, iter(requests))
    for request, story in zip(requests, together, strict=True):
        (alone,) = generate_all(chaotic(end=0.1, n_ctx=n_ctx), tokenizer, [request])
        assert dataclasses.replace(story, seconds=0.0) == dataclasses.replace(alone, seconds=0.0)
    assert engine.content == {}, "every slot is free again"


def test_stories_share_their_steps(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0, n_slots=3, n_ctx=100)
    generate_all(engine, tokenizer, [Request(settings=WILD, max_tokens=9, number=i) for i in range(6)])
    assert engine.steps == [3] * 16


def test_requests_are_taken_only_as_slots_become_free(chaotic: Make, tokenizer: Tokenizer) -> None:
    taken = []

    def requests() -> Any:
        for i in range(1000):
            taken.append(i)
            yield Request(settings=WILD, max_tokens=4, number=i)

    events = stream_all(chaotic(end=0, n_slots=2), tokenizer, requests())
    done = []
    while len(done) < 4:
        index, item = next(events)
        if isinstance(item, Story):
            done.append(index)
            assert item.number == index
    assert done == [0, 1, 2, 3]
    assert len(taken) <= 6
    events.close()


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_pieces_make_up_the_continuation(chaotic: Make, tokenizer: Tokenizer, end: float) -> None:
    requests = [Request(settings=WILD, max_tokens=30, number=i, stop=("at", "e ")) for i in range(7)]
    texts = [""] * 7
    for index, item in stream_all(chaotic(end=end, n_slots=3), tokenizer, requests):
        if isinstance(item, Story):
            assert item.continuation == texts[index]
        else:
            assert item
            texts[index] += item
    assert any(texts)


def test_seeds_and_numbers_make_different_stories(chaotic: Make, tokenizer: Tokenizer) -> None:
    requests = [Request(settings=WILD, max_tokens=9, seed=s, number=n) for s in range(4) for n in range(4)]
    assert len({story.ids for story in generate_all(chaotic(end=0, n_slots=4), tokenizer, requests)}) == 16


def test_a_stop_string_ends_the_story_and_is_cut(scripted: Make, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" cat sat on a mat")
    story = generate(scripted(ids), tokenizer, "The", settings=GREEDY, stop=("on", "t on a"))
    assert (story.text, story.stop_reason) == ("The cat sat ", "stop")
    assert len(story.ids) < len(ids)


def test_an_unfinished_stop_string_is_told_at_the_end(scripted: Make, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" cat sat")
    for max_tokens, reason in ((99, "end"), (len(ids), "length")):
        story = generate(scripted(ids), tokenizer, settings=GREEDY, stop=("sat down",), max_tokens=max_tokens)
        assert (story.text, story.stop_reason) == (" cat sat", reason)


def test_length_is_a_reason_only_where_there_is_no_better(scripted: Make, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" cat sat")
    ended = generate(scripted(ids), tokenizer, settings=GREEDY, max_tokens=len(ids) + 1)
    stopped = generate(scripted(ids), tokenizer, settings=GREEDY, max_tokens=len(ids), stop=("sat",))
    assert (ended.stop_reason, stopped.stop_reason) == ("end", "stop")


def test_a_prompt_is_not_searched_for_stop_strings(scripted: Make, tokenizer: Tokenizer) -> None:
    story = generate(scripted(tokenizer.encode(" cat")), tokenizer, "The", settings=GREEDY, stop=("The", "e c"))
    assert story.text == "The cat"


def test_ignore_end_begins_a_new_story_after_the_end(scripted: Make, tokenizer: Tokenizer) -> None:
    """A new story begins with a context of its own and stands after a blank line."""
    end = tokenizer.end_id
    one, two = tokenizer.encode("One."), tokenizer.encode("Two.")
    script = [*one, end, end, *two, end]
    engine = scripted(script, n_ctx=100)
    story = generate(engine, tokenizer, settings=GREEDY, ignore_end=True, max_tokens=len(script))
    assert story.text == f"One.{CONTINUATION_SEPARATOR}Two."
    assert (story.ids, story.stop_reason) == (tuple(script), "length")
    engine = scripted(script, n_ctx=100)
    events = stream_all(
        engine, tokenizer, [Request(settings=GREEDY, ignore_end=True, max_tokens=len(script), prompt="The")]
    )
    seen = [list(engine.content[0]) for _, item in events if isinstance(item, str)]
    assert seen[-1][0] == end
    assert end not in seen[-1][1:]
    assert seen[-1][1:] == list(two[:-1])


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("n_slots", [1, 3])
def test_the_work_past_the_context_is_linear(chaotic: Make, tokenizer: Tokenizer, n_ctx: int, n_slots: int) -> None:
    """Fewer than two and a half positions are computed for each token, on average."""
    engine = chaotic(end=0, n_ctx=n_ctx, n_slots=n_slots)
    n = 200
    requests = [Request(prompt="cat" * i, settings=WILD, max_tokens=n, number=i) for i in range(n_slots)]
    batching = generate_all(engine, tokenizer, requests)
    assert [story.n_generated for story in batching] == [n] * n_slots
    assert engine.positions <= 2.5 * n_slots * (n + n_ctx)


def test_a_full_slot_keeps_its_newer_half(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0, n_ctx=8)
    contents = []
    rule = engine.rule
    engine.rule = lambda ids: contents.append(list(ids)) or rule(ids)
    story = generate(engine, tokenizer, settings=WILD, max_tokens=30)
    said = [tokenizer.end_id, *story.ids]
    assert [len(ids) for ids in contents] == [*range(1, 9), *([4, 5, 6, 7, 8] * 5)[:22]]
    assert contents == [said[i + 1 - len(ids) : i + 1] for i, ids in enumerate(contents)]


def test_thousands_of_tokens_take_linear_work(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0.05, n_ctx=32)
    some = [engine.rule([i]) for i in range(97)]
    engine.rule = lambda ids: some[sum(ids) % 97]
    story = generate(engine, tokenizer, settings=WILD, max_tokens=3000, ignore_end=True)
    assert (story.n_generated, story.stop_reason) == (3000, "length")
    assert engine.positions <= 7500


def test_a_prompt_longer_than_the_context_keeps_its_end(
    chaotic: Make, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = chaotic(end=0, n_ctx=8)
    prompt = "The cat sat on a mat and was happy. " * 3
    contents = []
    rule = engine.rule
    engine.rule = lambda ids: contents.append(list(ids)) or rule(ids)
    with caplog.at_level(logging.WARNING):
        story = generate(engine, tokenizer, prompt, settings=WILD, max_tokens=2)
    assert contents[0] == tokenizer.encode(prompt)[-4:]
    assert story.text.startswith(prompt)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "last 4" in caplog.text


def test_a_prompt_that_just_fits_is_read_whole(
    chaotic: Make, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    ids = tokenizer.encode("The cat")
    engine = chaotic(end=0, n_ctx=len(ids) + 1)
    generate(engine, tokenizer, "The cat", settings=WILD, max_tokens=1)
    assert engine.positions == len(ids) + 1
    assert not caplog.records


def test_end_written_in_a_prompt_is_text(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0, n_ctx=50)
    events = stream_all(engine, tokenizer, [Request(prompt=END, settings=WILD)])
    next(events)
    assert engine.content[0].count(tokenizer.end_id) == 1
    events.close()


def test_the_repetition_penalty_knows_the_prompt_and_the_story_but_not_the_end(
    tokenizer: Tokenizer, scripted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(logits: Any, _settings: Any, _u: Any, seen_mask: Any) -> list[int]:
        seen.append([set(np.flatnonzero(row).tolist()) for row in seen_mask])
        return [int(row.argmax()) for row in logits]

    monkeypatch.setattr(sampling, "sample_unchecked", spy)
    ids = tokenizer.encode(" cat sat")
    generate(scripted(ids), tokenizer, "The", settings=SamplingConfig(repetition_penalty=1.5))
    prompt = set(tokenizer.encode("The"))
    assert seen == [[prompt | set(ids[:n])] for n in range(len(ids) + 1)]


def test_the_repetition_penalty_looks_back_over_a_window(
    tokenizer: Tokenizer, scripted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(logits: Any, _settings: Any, _u: Any, seen_mask: Any) -> list[int]:
        seen.extend(set(np.flatnonzero(row).tolist()) for row in seen_mask)
        return [int(row.argmax()) for row in logits]

    monkeypatch.setattr(sampling, "sample_unchecked", spy)
    ids = tokenizer.encode(" cat sat on the cat")
    settings = SamplingConfig(repetition_penalty=1.5, repetition_window=3)
    generate(scripted(ids), tokenizer, "The", settings=settings)
    all_ids = [*tokenizer.encode("The"), *ids]
    n_prompt = len(all_ids) - len(ids)
    assert seen == [set(all_ids[max(0, n - 3) : n]) for n in range(n_prompt, len(all_ids) + 1)]
    assert max(map(len, seen)) == 3


def test_names_can_be_spared_the_repetition_penalty(
    tokenizer: Tokenizer, scripted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def spy(logits: Any, _settings: Any, _u: Any, seen_mask: Any) -> list[int]:
        seen.update(np.flatnonzero(seen_mask[0]).tolist())
        return [int(row.argmax()) for row in logits]

    monkeypatch.setattr(sampling, "sample_unchecked", spy)
    ids = tokenizer.encode(" Tom saw Zanzibara, a cat.")
    settings = SamplingConfig(repetition_penalty=1.5, penalize_names=False)
    generate(scripted(ids), tokenizer, "Once", settings=settings)
    penalized = {tokenizer.token_bytes[i].decode() for i in seen}
    assert penalized >= {",", "."}
    assert all(text.startswith(" ") and not text[1:2].isupper() for text in penalized - {",", "."})


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_a_closed_or_interrupted_stream_frees_the_slots(chaotic: Make, tokenizer: Tokenizer, how: str) -> None:
    engine = chaotic(end=0, n_slots=3)
    events = stream_all(engine, tokenizer, [Request(settings=WILD, number=i, max_tokens=50) for i in range(9)])
    next(events)
    assert len(engine.content) == 3
    if how == "close":
        events.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt())
    assert engine.content == {}


def test_an_error_in_the_engine_frees_the_slots(chaotic: Make, tokenizer: Tokenizer) -> None:
    engine = chaotic(end=0, n_slots=2)
    rule = engine.rule
    engine.rule = lambda ids: rule(ids) if len(ids) < 5 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate_all(engine, tokenizer, [Request(settings=WILD, number=i) for i in range(2)])
    assert engine.content == {}


def test_no_requests_are_no_stories(chaotic: Make, tokenizer: Tokenizer) -> None:
    assert generate_all(chaotic(), tokenizer, []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": ("a", "")},
        {"prompt": "caf\udce9"},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Request(**wrong)
