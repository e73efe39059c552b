"""Text goes to clients seldom and merged: the first and the last of an answer at once, nothing is lost or reordered."""

import asyncio
import contextlib
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
from serve_helpers import PATIENCE_S, GatedEngine, Running, wait_until

from tinystories.data.tokenizer import Tokenizer
from tinystories.generate.batching import StopReason
from tinystories.serve import outbox as outbox_module
from tinystories.serve.errors import ApiError
from tinystories.serve.jobs import Inbox, Piece
from tinystories.serve.outbox import MAX_CHUNKS_PER_S, MAX_PACE_S, Outbox

Serve = Callable[..., contextlib.AbstractContextManager[Running]]
NEVER_S = 3600.0


class ManualLoop:
    """Runs what it is asked to run only when a test says so."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        self.soon.append(functools.partial(callback, *arguments))

    def run_soon(self) -> int:
        """Run what waits; return how often the loop has been woken."""
        n_wakes = len(self.soon)
        while self.soon:
            self.soon.pop(0)()
        return n_wakes


class Clock:
    """A time that passes only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Speaker:
    """A running sequence, of which the outbox needs the inbox and what it has newly to say."""

    def __init__(self, *, n_ends: int = 0) -> None:
        self.inbox = Inbox(n_ends=n_ends)
        self.job = types.SimpleNamespace(inbox=self.inbox)
        self.new_texts: list[str] = []

    @property
    def has_news(self) -> bool:
        return bool(self.new_texts)

    def take_piece(self, stop_reason: StopReason | None = None) -> Piece:
        texts, self.new_texts = self.new_texts, []
        return Piece(index=0, text="".join(texts), stop_reason=stop_reason)


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(loop: ManualLoop, clock: Clock) -> Outbox:
    result = Outbox(pace_s=0.02, clock=clock)
    result.loop = loop  # type: ignore[assignment]
    return result


def flush(outbox: Outbox, *speakers: Speaker) -> None:
    outbox.flush(speakers)  # type: ignore[arg-type]


def texts_of(inbox: Inbox) -> list[str] | None:
    """What `take` would return now; None if it would wait."""

    if not inbox._changed.is_set():
        return None
    return [piece.text for piece in asyncio.run(inbox.take())]


def test_the_first_piece_goes_at_once_and_later_ones_together(loop: ManualLoop, clock: Clock, outbox: Outbox) -> None:
    speaker = Speaker()
    speaker.new_texts = ["a"]
    flush(outbox, speaker)
    assert loop.run_soon() == 1
    assert texts_of(speaker.inbox) == ["a"]
    for text in "bcd":
        speaker.new_texts.append(text)
        flush(outbox, speaker)
    assert loop.run_soon() == 0
    assert texts_of(speaker.inbox) is None
    clock.now += 0.021
    flush(outbox, speaker)
    assert loop.run_soon() == 1
    assert texts_of(speaker.inbox) == ["bcd"]
    clock.now += 0.021
    flush(outbox, speaker)  # nothing has come
    assert loop.run_soon() == 0
    speaker.new_texts = ["e"]
    flush(outbox, speaker)  # it need not wait, since nothing has been sent for as long
    assert loop.run_soon() == 1
    assert texts_of(speaker.inbox) == ["e"]


def test_what_is_urgent_wakes_its_own_client_only(loop: ManualLoop, outbox: Outbox) -> None:
    one, other = Speaker(), Speaker()
    one.new_texts = ["a"]
    flush(outbox, one, other)
    one.new_texts, other.new_texts = ["b"], ["x"]
    outbox.add(other.inbox, other.take_piece())
    flush(outbox, one, other)
    loop.run_soon()
    assert (texts_of(one.inbox), texts_of(other.inbox)) == (["a"], ["x"])
    one.new_texts.append("c")
    outbox.add(one.inbox, one.take_piece("length"))
    flush(outbox, other)
    loop.run_soon()
    assert texts_of(one.inbox) == ["bc"]
    outbox.add(other.inbox, ApiError(500, "it failed"))
    flush(outbox, other)
    loop.run_soon()
    with pytest.raises(ApiError, match="it failed"):
        texts_of(other.inbox)


def test_many_streams_take_longer_turns(loop: ManualLoop, clock: Clock, outbox: Outbox) -> None:
    speakers = [Speaker() for _ in range(64)]
    paces = ((1, 0.02), (16, 16 / MAX_CHUNKS_PER_S), (8, 8 / MAX_CHUNKS_PER_S), (64, MAX_PACE_S), (1, 0.02))
    for n_streams, pace_s in paces:
        for speaker in speakers[:n_streams]:
            speaker.new_texts.append("a")
        flush(outbox, *speakers)
        assert loop.run_soon() == 1  # for all of them
        assert [texts_of(speaker.inbox) for speaker in speakers[:n_streams]] == [["a"]] * n_streams
        speakers[0].new_texts.append("b")
        clock.now += pace_s - 0.001
        flush(outbox, *speakers)
        assert loop.run_soon() == 0
        clock.now += 0.002
        speakers[0].take_piece()


def test_the_text_of_a_whole_answer_stays_where_it_is(loop: ManualLoop, outbox: Outbox) -> None:
    speaker = Speaker(n_ends=1)
    speaker.new_texts = ["a"]
    flush(outbox, speaker)
    assert loop.run_soon() == 0
    assert speaker.has_news


def test_threads_lose_nothing_and_keep_the_order() -> None:
    n_pieces = 3000

    async def read() -> list[str]:
        outbox = Outbox(pace_s=0)
        outbox.start()
        speakers = [Speaker() for _ in range(3)]

        def write() -> None:
            for number in range(n_pieces):
                is_last = number == n_pieces - 1
                for speaker in speakers:
                    speaker.new_texts.append(f"{number} ")
                    if is_last or number % 100 == 0:
                        outbox.add(speaker.inbox, speaker.take_piece("length" if is_last else None))
                flush(outbox, *speakers)

        async def collect(inbox: Inbox) -> str:
            parts: list[Piece] = []
            while not (parts and parts[-1].stop_reason):
                parts += await inbox.take()
            return "".join(piece.text for piece in parts)

        thread = threading.Thread(target=write)
        thread.start()
        async with asyncio.timeout(PATIENCE_S):
            texts = await asyncio.gather(*[collect(speaker.inbox) for speaker in speakers])
        thread.join()
        return texts

    assert asyncio.run(read()) == ["".join(f"{number} " for number in range(n_pieces))] * 3


def test_an_answer_that_is_not_a_stream_waits_for_all_ends() -> None:
    inbox = Inbox(n_ends=2)
    for index, stop_reason in ((0, None), (0, "length"), (1, None)):
        inbox.add(Piece(index=index, text="a", stop_reason=stop_reason))  # type: ignore[arg-type]
        inbox.wake()
        assert texts_of(inbox) is None
    inbox.add(Piece(index=1, text="b", stop_reason="end"))
    inbox.wake()
    assert texts_of(inbox) == ["aa", "ab"]


def test_an_outbox_whose_loop_has_ended_is_quiet() -> None:
    async def start() -> Outbox:
        outbox = Outbox(pace_s=0)
        outbox.start()
        return outbox

    speaker = Speaker()
    speaker.new_texts = ["a"]
    flush(asyncio.run(start()), speaker)


def test_a_stream_gets_its_first_text_at_once_and_the_rest_merged(
    serve_script: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pace that never comes, only the beginning and the end are sent, and nothing is lost between them."""
    monkeypatch.setattr(outbox_module, "MAX_PACE_S", NEVER_S)
    text = "The cat sat on a mat and was happy."
    with serve_script(text, pace_s=NEVER_S) as running:
        engine = running.engine
        assert isinstance(engine, GatedEngine)
        engine.close_gate()
        fields: dict[str, Any] = {"prompt": "Once", "logprobs": 2, "stream_options": {"include_usage": True}}
        with running.client.open_stream(**fields) as stream, running.client.open_stream(prompt="Two") as other:
            events, others = stream.events(), other.events()
            wait_until(lambda: running.scheduler.n_open == 2)
            engine.allow(3)  # both prompts, and a step of the first before or after the second one
            first, other_first = next(events), next(others)
            engine.open_gate()
            last, usage = list(events)
            (other_last,) = others
        whole = running.client.complete(**fields | {"stream_options": None})
    assert whole["text"] == text
    assert other_first["choices"][0]["text"] + other_last["choices"][0]["text"] == text
    one, rest = first["choices"][0], last["choices"][0]
    assert one["text"].startswith(tokenizer.decode(tokenizer.encode(text)[:1]))
    assert (one["text"] + rest["text"], one["finish_reason"], rest["finish_reason"]) == (text, None, "stop")
    assert usage["usage"]["completion_tokens"] == len(tokenizer.encode(text)) + 1
    for name, values in rest["logprobs"].items():
        assert one["logprobs"][name] + values == whole["logprobs"][name]
    assert "".join(rest["logprobs"]["tokens"]) == rest["text"]


def test_a_story_that_is_not_streamed_wakes_its_answer_once(serve_script: Serve) -> None:
    with serve_script("The cat sat on a mat.") as running:
        n_wakes = 0
        take = Inbox.take

        async def count(inbox: Inbox) -> list[Piece]:
            nonlocal n_wakes
            n_wakes += 1
            return await take(inbox)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Inbox, "take", count)
            answer = running.client.ask(prompt="Once", n=2)
        assert [choice["text"] for choice in answer["choices"]] == ["The cat sat on a mat."] * 2
        assert n_wakes == 1
