"""One storyteller used from two places at once: exact results or a clear error; a dropped stream blocks nobody."""

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tinystories
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.errors import UserError

TEXTS = ["Once upon a time there was a dog. " * 20, "The cat sat on a mat and saw a big red bird. " * 15]


@pytest.fixture(scope="module", params=["cpu", "torch"])
def storyteller(request: pytest.FixtureRequest) -> tinystories.Storyteller:
    return tinystories.load(engine=request.param, device="cpu", precision="fp32")


def scores(storyteller: tinystories.Storyteller, text: str) -> list[float]:
    return [token.logprob for token in storyteller.score(text)]


def test_a_call_that_starts_during_another_does_not_change_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As reported, but in a fixed order: the second text is scored between two chunks of the first."""
    storyteller = tinystories.load(engine="cpu", threads=1)
    engine = storyteller.engine
    assert isinstance(engine, CpuEngine)
    expected = [scores(storyteller, text) for text in TEXTS]
    run = engine.runtime.run
    inner: list[list[float]] = []

    def run_between(*args: Any, **kwargs: Any) -> np.ndarray:
        logits = run(*args, **kwargs)
        monkeypatch.setattr(engine.runtime, "run", run)
        with ThreadPoolExecutor(1) as other_thread:
            inner.append(other_thread.submit(scores, storyteller, TEXTS[1]).result())
        return logits

    monkeypatch.setattr(engine.runtime, "run", run_between)
    assert scores(storyteller, TEXTS[0]) == expected[0]
    assert inner == [expected[1]]
    assert len(engine._idle_scoring_caches) == 2  # reused by later calls, however many
    assert scores(storyteller, TEXTS[0]) == expected[0]
    assert len(engine._idle_scoring_caches) == 2


def test_scores_from_two_threads_are_those_of_one(storyteller: tinystories.Storyteller) -> None:
    expected = [scores(storyteller, text) for text in TEXTS]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda i: scores(storyteller, TEXTS[i % 2]), range(6))) == expected * 3


def test_scoring_and_generating_do_not_disturb_each_other(storyteller: tinystories.Storyteller) -> None:
    expected_score = scores(storyteller, TEXTS[0])
    expected_text = "".join(storyteller.stream("One day", seed=1, max_tokens=30))
    stream = storyteller.stream("One day", seed=1, max_tokens=30)
    text = next(stream)
    assert scores(storyteller, TEXTS[0]) == expected_score
    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(scores, storyteller, TEXTS[0]).result() == expected_score
    assert text + "".join(stream) == expected_text


def test_two_storytellers_generate_in_two_threads() -> None:
    storytellers = [tinystories.load(engine="cpu", threads=threads) for threads in (1, 2)]
    expected = storytellers[0].generate("One day", seed=2, max_tokens=40).ids
    with ThreadPoolExecutor(2) as pool:
        for story in pool.map(lambda i: storytellers[i].generate("One day", seed=2, max_tokens=40), range(2)):
            assert story.ids == expected


def test_generating_in_a_second_thread_is_an_error_that_says_so(storyteller: tinystories.Storyteller) -> None:
    stream = storyteller.stream("One day", seed=1, max_tokens=30)
    next(stream)
    with ThreadPoolExecutor(1) as other_thread, pytest.raises(UserError, match="another thread is generating"):
        other_thread.submit(storyteller.generate, "One day", max_tokens=3).result()
    stream.close()
    storyteller.generate("One day", max_tokens=3)


class Reader:
    """Keeps its stream in a reference cycle, as objects with callbacks do."""

    def __init__(self, stream: Iterator[str]) -> None:
        self.stream = stream
        self.me = self
        next(stream)


def test_a_stream_dropped_in_a_reference_cycle_does_not_block(storyteller: tinystories.Storyteller) -> None:
    gc.disable()  # otherwise it may be collected before
    try:
        Reader(storyteller.stream("One day", max_tokens=30))
        assert storyteller.generate("One day", max_tokens=3).n_generated == 3
    finally:
        gc.enable()


def test_a_stream_that_was_left_by_an_exception_does_not_block(storyteller: tinystories.Storyteller) -> None:
    def read() -> None:
        for _ in storyteller.stream("One day", max_tokens=30):
            raise ValueError

    with pytest.raises(ValueError):
        read()
    storyteller.generate("One day", max_tokens=3)


def test_a_stream_may_be_closed_by_another_thread(storyteller: tinystories.Storyteller) -> None:
    stream = storyteller.stream("One day", max_tokens=30)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    storyteller.generate("One day", max_tokens=3)


def test_a_stream_that_was_never_started_does_not_block(storyteller: tinystories.Storyteller) -> None:
    stream = storyteller.stream("One day", max_tokens=30)
    storyteller.generate("One day", max_tokens=3)
    stream.close()
