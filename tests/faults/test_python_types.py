"""Arguments of a wrong type to the Python API: a `UserError` that names the argument, before any work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinystories
from tinystories.data.source.resolve import resolve_source
from tinystories.errors import UserError


@pytest.fixture(scope="module")
def storyteller() -> tinystories.Storyteller:
    return tinystories.load(threads=1)


REPORTED = [
    {"max_tokens": 10.5, "ignore_end": True},  # ran forever
    {"prompt": ["a", "b"]},
    {"prompt": None},
    {"top_k": 2.0},
    {"temperature": "0.8"},
    {"stop": 5},
]
RELATIVES = [
    {"prompt": 5},
    {"prompt": b"Once"},
    {"max_tokens": "5"},
    {"max_tokens": True},
    {"seed": "x"},
    {"seed": 1.0},
    {"ignore_end": "no"},
    {"stop": ["end", 5]},
    {"stop": b"end"},
    {"stop": "\ud800"},
    {"top_p": "1"},
    {"min_p": [0.1]},
    {"repetition_penalty": "1.1"},
    {"temperature": False},
]


@pytest.mark.parametrize("options", [*REPORTED, *RELATIVES], ids=str)
def test_wrong_types_of_generation_options_are_named(
    storyteller: tinystories.Storyteller, options: dict[str, Any]
) -> None:
    name = next(iter(options))
    calls: list[Callable[[], object]] = [
        lambda: storyteller.generate(**({"max_tokens": 5} | options)),
        lambda: storyteller.generate(num=2, **({"max_tokens": 5} | options)),
        lambda: list(storyteller.stream(**({"max_tokens": 5} | options))),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"{name}[= ]|a stop string"):
            call()


@pytest.mark.parametrize("num", ["3", 2.0, True])
def test_a_wrong_type_of_num_is_named(storyteller: tinystories.Storyteller, num: Any) -> None:
    with pytest.raises(UserError, match=r"num=.* must be an integer"):
        storyteller.generate(num=num, max_tokens=1)


@pytest.mark.parametrize("text", [5, None, ["Once"], b"Once"])
def test_only_a_string_is_scored(storyteller: tinystories.Storyteller, text: Any) -> None:
    with pytest.raises(UserError, match="the text must be one string"):
        storyteller.score(text)


@pytest.mark.parametrize("model", [3, 2.5, True, ["runs/a"], b"runs/a"], ids=str)
def test_a_model_that_is_not_a_path_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match=f"not {type(model).__name__}"):
        tinystories.load(model)


@pytest.mark.parametrize(
    "option",
    [
        {"engine": 3},
        {"engine": ["cpu"]},
        {"precision": 8},
        {"device": 3},
        {"device": None},
        {"n_slots": "8"},
        {"n_slots": 2.0},
        {"threads": "2"},
        {"threads": 1.5},
        {"shortlist": "yes"},
    ],
    ids=str,
)
def test_wrong_types_of_load_options_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"{next(iter(option))}[ =]"):
        tinystories.load(**option)


@pytest.mark.parametrize("source", [3, b"a.txt", None, ["a.txt", 3]], ids=str)
def test_a_source_that_is_not_a_name_is_refused(source: Any) -> None:
    with pytest.raises(UserError, match="a source is a name or a path"):
        resolve_source(source)


def test_numbers_of_numpy_and_integers_for_floats_are_accepted(storyteller: tinystories.Storyteller) -> None:
    plain = storyteller.generate("One day", max_tokens=4, seed=3, top_k=5, temperature=0.5, repetition_penalty=1.0)
    numpy = storyteller.generate(
        "One day",
        max_tokens=np.int64(4),
        seed=np.uint32(3),
        top_k=np.int8(5),
        temperature=np.float32(0.5),
        repetition_penalty=1,
    )
    assert plain.text == numpy.text
    assert storyteller.generate("One day", max_tokens=4, seed=3, stop=iter(["zebra"])).n_generated == 4
